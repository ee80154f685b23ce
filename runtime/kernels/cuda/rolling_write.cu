// The first half of RollingAttention for chunks: RoPE, and the write of the chunk's keys and values into their slots.
//
// A thread has sixteen numbers of one head of one token: eight pairs of a query or key, or sixteen elements of a value.
// Rotated queries go to the workspace for the attention that follows; those of padding are zeros.
//
// Definitions: HEAD_DIM, ACTIVATION, RING, INTERLEAVED, THREADS.
#include "device.cuh"
#include "rolling_ring.cuh"

struct RollingWrite {
    const u8* query;      // [B, T, H, D], tokens query_stride elements apart
    const u8* key;        // [B, T, G, D], key_stride
    const u8* value;      // [B, T, G, D], value_stride
    const u8* cos;        // [B, T, D/2]
    const u8* sin;        // [B, T, D/2]
    u8* key_ring;         // [B, G, S, D]
    u8* value_ring;       // [B, G, S, D]
    const i64* start;     // [B]
    const i64* count;     // [B]
    u8* rotated;          // [B, T, H, D]
    u32 query_stride, key_stride, value_stride;
    u32 slots;
    u32 heads, kv_heads;
};

constexpr u32 ITEMS = HEAD_DIM / 16, PAIRS = HEAD_DIM / 2;
struct alignas(8) Vector8 { u32 word[2]; };
struct Eight { float x[8]; };

DEVICE Eight load_floats(const u8* from) {
    const Vector16 low = load_16(from), high = load_16(from + 16);
    Eight y;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        y.x[i] = bits_float(low.word[i]);
        y.x[4 + i] = bits_float(high.word[i]);
    }
    return y;
}
DEVICE Eight load_eight(const u8* from) {
    const Vector16 v = load_16(from);
    Eight y;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        ACTIVATION number;
        number.bits = u16(v.word[i / 2] >> (16 * (i % 2)));
        y.x[i] = to_float(number);
    }
    return y;
}
DEVICE void store_rotated(u8* to, Eight y) {
    Vector16 v;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) v.word[i] = pack_two<ACTIVATION>(y.x[2 * i], y.x[2 * i + 1]);
    store_16(to, v);
}
DEVICE void store_in_ring(u8* to, Eight y) {
    constexpr u32 EACH = 4 / sizeof(RING), WORDS = 8 / EACH;
    u32 word[WORDS] = {};
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        word[i / EACH] |= u32(to_ring<RING, ACTIVATION>(y.x[i]).bits) << (8 * sizeof(RING) * (i % EACH));
    if constexpr (WORDS == 4) {
        store_16(to, {{word[0], word[1], word[2], word[3]}});
    } else {
        *reinterpret_cast<Vector8*>(to) = {{word[0], word[1]}};
    }
}

// The places, within a head, of a thread's two runs of eight numbers, and the numbers turned.
struct Runs { u32 first, second; };
DEVICE Runs runs_of(u32 item) {
    return INTERLEAVED ? Runs{16 * item, 16 * item + 8} : Runs{8 * item, 8 * item + PAIRS};
}
DEVICE void turn(Eight& low, Eight& high, const Eight& cos, const Eight& sin) {
    if constexpr (INTERLEAVED) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const Pair a = turned({low.x[2 * i], low.x[2 * i + 1]}, cos.x[i], sin.x[i]);
            const Pair b = turned({high.x[2 * i], high.x[2 * i + 1]}, cos.x[4 + i], sin.x[4 + i]);
            low.x[2 * i] = a.first, low.x[2 * i + 1] = a.second;
            high.x[2 * i] = b.first, high.x[2 * i + 1] = b.second;
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const Pair a = turned({low.x[i], high.x[i]}, cos.x[i], sin.x[i]);
            low.x[i] = a.first, high.x[i] = a.second;
        }
    }
}

CIERZO_KERNEL(rolling_write, RollingWrite, THREADS) {
    const u32 i = block_y() * THREADS + thread_x(), head = i / ITEMS, item = i % ITEMS;
    if (head >= params.heads + 2 * params.kv_heads) return;
    const u32 t = block_x(), row = block_z();
    const u64 token = u64(row) * grid_x() + t;
    const bool counts = i64(t) < params.count[row], of_query = head < params.heads;
    if (!counts && !of_query) return;

    const bool of_key = !of_query && head - params.heads < params.kv_heads;
    const u32 kv_head = of_key ? head - params.heads : head - params.heads - params.kv_heads;
    const u8* const source = of_query ? params.query : of_key ? params.key : params.value;
    const u32 stride = of_query ? params.query_stride : of_key ? params.key_stride : params.value_stride;
    const u8* const from = source + (token * stride + (of_query ? head : kv_head) * HEAD_DIM) * 2;
    const Runs runs = runs_of(item);
    Eight low = {}, high = {};
    if (counts) {
        low = load_eight(from + runs.first * 2);
        high = load_eight(from + runs.second * 2);
        if (of_query || of_key) {
            const u64 angles = (token * PAIRS + 8 * item) * 4;
            turn(low, high, load_floats(params.cos + angles), load_floats(params.sin + angles));
        }
    }
    if (of_query) {
        u8* const to = params.rotated + (token * params.heads + head) * (HEAD_DIM * 2);
        store_rotated(to + runs.first * 2, low);
        store_rotated(to + runs.second * 2, high);
    } else {
        const u32 slot = u32((u64(params.start[row]) + t) % params.slots);
        const u64 place = ((u64(row) * params.kv_heads + kv_head) * params.slots + slot) * HEAD_DIM;
        u8* const to = (of_key ? params.key_ring : params.value_ring) + place * sizeof(RING);
        store_in_ring(to + runs.first * sizeof(RING), low);
        store_in_ring(to + runs.second * sizeof(RING), high);
    }
}
