// The k largest of a row, best first; of equals the lower id first, and NaN before all numbers.
//
// A block has a chunk of a row in shared memory, as 64-bit keys that no two entries share: the value's order above, the
// id's below. It finds the k-th largest key eight bits at a time (radix select: Alabi et al. 2012, "Fast k-selection
// algorithms for graphics processing units"), from the top until a digit leaves exactly what is wanted. What the
// chunks' blocks kept goes through the same kernel again, until one block has it all. Which keys are kept, and in the
// end their order, does not depend on how threads run.
#include "order.cuh"

#ifndef FROM_LOGITS
#define FROM_LOGITS 1  // or 0: keys that an earlier launch kept
#define LAST 1         // or 0: keep keys for another launch
#endif

constexpr u32 THREADS = 256, MOST_KEPT = 64, DIGITS = 256;

struct TopParams {
    const float* logits;  // [N, count]
    const u64* keys;      // [N, count]
    u64* kept;            // [N, chunks, k]
    float* values;        // [N, k]
    int* ids;             // [N, k]
    u32 count, chunk, k;  // every chunk has at least k entries
};

// In shared memory, behind the chunk's keys.
struct Selection {
    u64 chosen[MOST_KEPT];
    u32 entries[DIGITS];  // how many keys have each digit
    u32 digit, above, within;  // the digit of the k-th largest; how many keys have larger ones, how many this
    u32 found;
};

DEVICE u64 key_of(float x, u32 id) {
    return u64(x == x ? ordered_bits(x) : 0xffffffffu) << 32 | u64(~id);
}

// One warp: the digit at which, counted from the largest, there are `wanted` keys.
DEVICE void find_digit(Selection& selection, u32 wanted) {
    u32 mine[DIGITS / 32], sum = 0;
    for (u32 i = 0; i < DIGITS / 32; i++) sum += mine[i] = selection.entries[DIGITS - 1 - (lane() * (DIGITS / 32) + i)];
    u32 through = sum;
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 lower = shuffle(through, lane() >= step ? lane() - step : 0);
        through += lane() >= step ? lower : 0;
    }
    u32 before = through - sum;
    if (before >= wanted || through < wanted) return;  // it is another lane's; one has it
    for (u32 i = 0; i < DIGITS / 32; i++) {
        if (before < wanted && before + mine[i] >= wanted) {
            selection.digit = DIGITS - 1 - (lane() * (DIGITS / 32) + i);
            selection.above = before;
            selection.within = mine[i];
        }
        before += mine[i];
    }
}

// The least key that is kept: as many as `wanted` are not below it. All threads take part.
DEVICE u64 find_threshold(Selection& selection, const u64* keys, u32 count, u32 wanted) {
    u64 threshold = 0, known = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (u32 d = thread_x(); d < DIGITS; d += THREADS) selection.entries[d] = 0;
        block_sync();
        for (u32 i = thread_x(); i < count; i += THREADS)
            if ((keys[i] & known) == threshold) atomic_add(&selection.entries[u32(keys[i] >> shift) & 255], 1);
        block_sync();
        if (warp() == 0) find_digit(selection, wanted);
        block_sync();
        threshold |= u64(selection.digit) << shift;
        known |= u64(255) << shift;
        wanted -= selection.above;
        if (selection.within == wanted) break;
    }
    return threshold;
}

CIERZO_KERNEL(top_logits, TopParams, THREADS) {
    CIERZO_SHARED(memory);
    u64* keys = reinterpret_cast<u64*>(memory);
    Selection& selection = *reinterpret_cast<Selection*>(memory + u64(params.chunk) * 8);
    const u64 row = block_y();
    const u32 k = params.k, begin = block_x() * params.chunk;
    const u32 count = params.count - begin < params.chunk ? params.count - begin : params.chunk;
    if (thread_x() == 0) selection.found = 0;
    for (u32 i = thread_x(); i < count; i += THREADS) {
#if FROM_LOGITS
        keys[i] = key_of(params.logits[row * params.count + begin + i], begin + i);
#else
        keys[i] = params.keys[row * params.count + begin + i];
#endif
    }
    block_sync();
    const u64 threshold = find_threshold(selection, keys, count, k);
    for (u32 i = thread_x(); i < count; i += THREADS)
        if (keys[i] >= threshold) selection.chosen[atomic_add(&selection.found, 1)] = keys[i];
    block_sync();
    if (thread_x() >= k) return;
    const u64 mine = selection.chosen[thread_x()];
#if LAST
    u32 rank = 0;
    for (u32 i = 0; i < k; i++) rank += selection.chosen[i] > mine;
    params.values[row * k + rank] = float_of_ordered(u32(mine >> 32));
    params.ids[row * k + rank] = int(~u32(mine));
#else
    params.kept[(row * grid_x() + block_x()) * k + thread_x()] = mine;
#endif
}
