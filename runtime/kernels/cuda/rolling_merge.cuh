// Parts of one attended row become one: the warps of a block through shared memory, its splits through the workspace.
//
// A part is what it attended, unnormalised, and (largest score, total weight) of each head. Parts are added in order of
// their number, whoever finished first.
#pragma once
#include "device.cuh"
#include "rolling_softmax.cuh"

constexpr u32 PADDED_HEADS = 8 * COLUMNS;
constexpr u32 PART_ROW = HEAD_DIM + 4;  // floats; lanes that hold other heads then write to other banks
constexpr u32 PART_BYTES = PADDED_HEADS * (PART_ROW + 2) * 4;
constexpr u32 QUARTERS = HEAD_DIM / 4;  // four elements of a head are a thread's item

struct Statistics { float largest, total; };
struct alignas(16) Four { float x[4]; };

DEVICE Statistics* statistics_of(u8* part) { return reinterpret_cast<Statistics*>(part + PADDED_HEADS * PART_ROW * 4); }

// Writes a warp's part to shared memory.
DEVICE void save_part(u8* part, const Attention& attention) {
    float* attended = reinterpret_cast<float*>(part);
#pragma unroll
    for (u32 n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 head = 8 * n + 2 * (lane() % 4) + i;
            float total = attention.total[n][i];
#pragma unroll
            for (u32 mask = 4; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
            if (lane() < 4) statistics_of(part)[head] = {attention.largest[n][i], total};
#pragma unroll
            for (u32 depth = 0; depth < DEPTH; ++depth) {
                attended[head * PART_ROW + attended_element(depth, false)] = attention.attended[depth][n][i];
                attended[head * PART_ROW + attended_element(depth, true)] = attention.attended[depth][n][i + 2];
            }
        }
    }
}

// Four elements of one head out of its parts, part(i) giving the four of part i and statistics(i) its statistics.
template <typename Part, typename Numbers>
DEVICE Four merged(u32 parts, Part part, Numbers statistics, Statistics& whole) {
    whole = {-bits_float(INFINITE), 0.0f};
    for (u32 i = 0; i < parts; ++i) whole.largest = larger(statistics(i).largest, whole.largest);
    const float reference = reference_score(whole.largest);
    Four sum = {};
#pragma unroll 8
    for (u32 i = 0; i < parts; ++i) {
        const float weight = exp2_fast(statistics(i).largest - reference);
        const Four of_part = part(i);
        whole.total = multiply_add(statistics(i).total, weight, whole.total);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) sum.x[j] = multiply_add(of_part.x[j], weight, sum.x[j]);
    }
    return sum;
}

// Normalises and rounds. A total of 0, where all scores are minus infinity, gives NaN.
DEVICE void write_attended(u8* to, Four sum, float total) {
    const float factor = reciprocal(total);
    u32* words = reinterpret_cast<u32*>(to);
    words[0] = pack_two<ACTIVATION>(sum.x[0] * factor, sum.x[1] * factor);
    words[1] = pack_two<ACTIVATION>(sum.x[2] * factor, sum.x[3] * factor);
}

// Counts this block's arrival, by one thread: true for the last of `parts`, which leaves the count as it was found.
//
// The count lies in memory of any content, which other kernels may use between two calls. So it is taken for a count
// only if it begins with 52 bits that hardly any data begin with, and for none otherwise; the last block wipes it.
constexpr u64 MARK = 0x9d3fc61be7a25000ull, MOST_PARTS = 0xfff;

DEVICE bool arrives_last(u64* arrivals, u32 parts) {
    memory_fence();
    u64 seen = *static_cast<volatile u64*>(arrivals);
    for (;;) {
        const u64 before = (seen & ~MOST_PARTS) == MARK ? seen & MOST_PARTS : 0;
        const u64 now = before + 1 == parts ? 0 : MARK + before + 1;
        const u64 found = compare_and_swap(arrivals, seen, now);
        if (found == seen) {
            memory_fence();
            return now == 0;
        }
        seen = found;
    }
}
