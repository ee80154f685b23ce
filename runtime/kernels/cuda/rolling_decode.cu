// RollingAttention for one token a row: RoPE, ring write and attention in one pass over the visible slots.
//
// A block has one row, up to sixteen query heads of one KV head, and a share of the visible positions: whole tiles of
// WARPS * STEP keys. Its warps take turns at the tile's steps, each with a pipeline of its own, and meet at the end.
// Each key and value is read once; the new token's go to the ring, and through shared memory to the one warp that attends
// to it. The last block of a row to finish merges what all of them have written to the workspace.
//
// Definitions: HEAD_DIM, HEADS (query heads of a block, at most 16), ACTIVATION, RING, INTERLEAVED, WARPS, STAGES.
#include "device.cuh"
#include "rolling_merge.cuh"
#include "rolling_ring.cuh"
#include "rolling_softmax.cuh"
#include "rolling_step.cuh"

struct RollingDecode {
    const ACTIVATION* query;   // [B, H, D], rows query_stride elements apart
    const ACTIVATION* key;     // [B, G, D], key_stride
    const ACTIVATION* value;   // [B, G, D], value_stride
    const float* cos;          // [B, D/2]
    const float* sin;          // [B, D/2]
    RING* key_ring;            // [B, G, S, D]
    RING* value_ring;          // [B, G, S, D]
    const i64* start;          // [B]
    const i64* count;          // [B]
    ACTIVATION* attended;      // [B, H, D]
    float* partial;            // [B, G * blocks, splits, HEADS, D], unnormalised
    Statistics* statistics;    // [B, G * blocks, splits, HEADS]
    u64* arrivals;             // [B, G * blocks]
    u32 query_stride, key_stride, value_stride;
    u32 slots, window;         // the window never more than the slots
    u32 kv_heads, group;       // query heads of a KV head
    u32 blocks;                // that these take, HEADS of them each
    float scale;               // of the scores, to base 2
};

constexpr u32 THREADS = WARPS * 32, TILE = WARPS * STEP, PAIRS = HEAD_DIM / 2;
constexpr u32 QUERY_ROW = HEAD_DIM + 8;  // elements; keeps eight heads' words in different banks
constexpr u32 RINGS = WARPS * STAGES * STAGE;
static_assert(WARPS * PART_BYTES <= RINGS, "parts take the place of the stages");

DEVICE void rotate_queries(const RollingDecode& params, ACTIVATION* rotated, u32 row, u32 first_head, u32 heads) {
    const ACTIVATION* query = params.query + u64(row) * params.query_stride + first_head * HEAD_DIM;
    for (u32 i = thread_x(); i < PADDED_HEADS * PAIRS; i += THREADS) {
        const u32 head = i / PAIRS, pair = i % PAIRS;
        const u32 first = first_of_pair<INTERLEAVED>(pair), second = second_of_pair<INTERLEAVED, HEAD_DIM>(pair);
        Pair x = {0.0f, 0.0f};
        if (head < heads) {
            const ACTIVATION* of_head = query + head * HEAD_DIM;
            const float cos = params.cos[u64(row) * PAIRS + pair], sin = params.sin[u64(row) * PAIRS + pair];
            x = turned({to_float(of_head[first]), to_float(of_head[second])}, cos, sin);
        }
        rotated[head * QUERY_ROW + first] = from_float<ACTIVATION>(x.first);
        rotated[head * QUERY_ROW + second] = from_float<ACTIVATION>(x.second);
    }
}

// The new token's key, then its value, to shared memory and, where `writes`, to the ring.
DEVICE void take_newest(const RollingDecode& params, RING* newest, u32 row, u32 kv_head, u32 slot, bool writes) {
    const ACTIVATION* key = params.key + u64(row) * params.key_stride + kv_head * HEAD_DIM;
    const ACTIVATION* value = params.value + u64(row) * params.value_stride + kv_head * HEAD_DIM;
    const u64 place = ((u64(row) * params.kv_heads + kv_head) * params.slots + slot) * HEAD_DIM;
    for (u32 pair = thread_x(); pair < PAIRS; pair += THREADS) {
        const u32 first = first_of_pair<INTERLEAVED>(pair), second = second_of_pair<INTERLEAVED, HEAD_DIM>(pair);
        const float cos = params.cos[u64(row) * PAIRS + pair], sin = params.sin[u64(row) * PAIRS + pair];
        const Pair x = turned({to_float(key[first]), to_float(key[second])}, cos, sin);
        newest[first] = to_ring<RING, ACTIVATION>(x.first);
        newest[second] = to_ring<RING, ACTIVATION>(x.second);
        newest[HEAD_DIM + first] = to_ring<RING, ACTIVATION>(to_float(value[first]));
        newest[HEAD_DIM + second] = to_ring<RING, ACTIVATION>(to_float(value[second]));
        if (writes) {
            params.key_ring[place + first] = newest[first];
            params.key_ring[place + second] = newest[second];
            params.value_ring[place + first] = newest[HEAD_DIM + first];
            params.value_ring[place + second] = newest[HEAD_DIM + second];
        }
    }
}

DEVICE void put_newest(u8* stage, const u8* newest, u32 row_of_stage) {
    for (u32 i = lane(); i < 2 * CHUNKS; i += 32) {
        const u32 row = i < CHUNKS ? row_of_stage : STEP + row_of_stage, chunk = i % CHUNKS;
        *reinterpret_cast<Vector16*>(stage + row * ROW + chunk * 16) = reinterpret_cast<const Vector16*>(newest)[i];
    }
}

DEVICE void load_queries(u32 (&query)[DEPTH][COLUMNS][2], const ACTIVATION* rotated) {
#pragma unroll
    for (u32 depth = 0; depth < DEPTH; ++depth)
#pragma unroll
        for (u32 n = 0; n < COLUMNS; ++n)
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
                query[depth][n][i] = *reinterpret_cast<const u32*>(
                    rotated + (8 * n + lane() / 4) * QUERY_ROW + query_element(depth, i));
}

CIERZO_KERNEL(rolling_decode, RollingDecode, WARPS * 32) {
    CIERZO_SHARED(shared);
    u8* const rings = shared;
    ACTIVATION* const rotated = reinterpret_cast<ACTIVATION*>(shared + RINGS);
    u8* const newest = shared + RINGS + PADDED_HEADS * QUERY_ROW * 2;
    u32* const last = reinterpret_cast<u32*>(newest + 2 * HEAD_DIM * RING_BYTES);

    const u32 split = block_x(), splits = grid_x(), row = block_z();
    const u32 kv_head = block_y() / params.blocks, block_of_group = block_y() % params.blocks;
    const u32 left = params.group - block_of_group * HEADS, heads = left < HEADS ? left : HEADS;
    const u32 first_head = kv_head * params.group + block_of_group * HEADS;
    ACTIVATION* const attended = params.attended
        + (u64(row) * params.kv_heads * params.group + first_head) * HEAD_DIM;

    if (params.count[row] <= 0) {
        if (split == 0)
            for (u32 i = thread_x(); i < heads * HEAD_DIM; i += THREADS) attended[i] = from_float<ACTIVATION>(0.0f);
        return;
    }
    const u64 position = u64(params.start[row]);
    // Every load waits for this, and a remainder of 64 bits takes long.
    const u32 slot = position >> 32 ? u32(position % params.slots) : u32(position) % params.slots;
    const u32 visible = position < params.window ? u32(position) + 1 : params.window;
    const u32 oldest_slot = slot + 1 >= visible ? slot + 1 - visible : slot + 1 + params.slots - visible;
    const u32 tiles = (visible + TILE - 1) / TILE, share = (tiles + splits - 1) / splits;
    const u32 parts = (tiles + share - 1) / share;
    if (split >= parts) return;
    const u32 first_tile = split * share, end_tile = tiles - first_tile < share ? tiles : first_tile + share;

    const u64 ring = (u64(row) * params.kv_heads + kv_head) * params.slots * HEAD_DIM;
    const u8* const key_ring = reinterpret_cast<const u8*>(params.key_ring + ring);
    const u8* const value_ring = reinterpret_cast<const u8*>(params.value_ring + ring);
    u8* const stages = rings + warp() * (STAGES * STAGE);
    for (u32 i = 0; i < STAGES; ++i) {
        const u32 tile = first_tile + i;
        if (tile < end_tile)
            fetch_step(
                stages + i * STAGE, key_ring, value_ring, tile * TILE + warp() * STEP, visible - 1, oldest_slot,
                params.slots);
        copy_async_commit();
    }
    rotate_queries(params, rotated, row, first_head, heads);
    if (split == parts - 1)
        take_newest(params, reinterpret_cast<RING*>(newest), row, kv_head, slot, block_of_group == 0);
    block_sync();

    u32 query[DEPTH][COLUMNS][2];
    load_queries(query, rotated);
    Attention attention;
    clear(attention);
    for (u32 tile = first_tile, stage = 0; tile < end_tile; ++tile) {
        u8* const here = stages + stage * STAGE;
        const u32 begin = tile * TILE + warp() * STEP;
        copy_async_wait<STAGES - 1>();
        warp_sync();
        if (begin < visible) {
            if (visible - begin <= STEP) {
                put_newest(here, newest, visible - 1 - begin);
                warp_sync();
            }
            attend(attention, query, here, visible - begin, params.scale);
        }
        warp_sync();
        if (end_tile - tile > STAGES)
            fetch_step(here, key_ring, value_ring, begin + STAGES * TILE, visible - 1, oldest_slot, params.slots);
        copy_async_commit();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    copy_async_wait<0>();
    block_sync();
    save_part(rings + warp() * PART_BYTES, attention);
    block_sync();

    const u64 row_of_parts = u64(row) * grid_y() + block_y();
    float* const partial = params.partial + row_of_parts * splits * HEADS * HEAD_DIM;
    Statistics* const statistics = params.statistics + row_of_parts * splits * HEADS;
    for (u32 i = thread_x(); i < heads * QUARTERS; i += THREADS) {
        const u32 head = i / QUARTERS, quarter = i % QUARTERS;
        Statistics whole;
        const Four sum = merged(
            WARPS,
            [&](u32 w) {
                return *reinterpret_cast<const Four*>(rings + w * PART_BYTES + (head * PART_ROW + 4 * quarter) * 4);
            },
            [&](u32 w) { return statistics_of(rings + w * PART_BYTES)[head]; }, whole);
        if (parts == 1) {
            write_attended(reinterpret_cast<u8*>(attended + 4 * i), sum, whole.total);
        } else {
            reinterpret_cast<Four*>(partial + split * HEADS * HEAD_DIM)[i] = sum;
            if (quarter == 0) statistics[split * HEADS + head] = whole;
        }
    }
    if (parts == 1) return;

    block_sync();
    if (thread_x() == 0) *last = arrives_last(params.arrivals + row_of_parts, parts);
    block_sync();
    const bool merges = *last;
    block_sync();  // what is gathered may reach as far as that word
    if (!merges) return;
    Statistics* const gathered = reinterpret_cast<Statistics*>(rings);
    for (u32 i = thread_x(); i < parts * HEADS; i += THREADS) gathered[i] = statistics[i];
    block_sync();
    for (u32 i = thread_x(); i < heads * QUARTERS; i += THREADS) {
        Statistics whole;
        const Four sum = merged(
            parts, [&](u32 part) { return reinterpret_cast<const Four*>(partial + part * HEADS * HEAD_DIM)[i]; },
            [&](u32 part) { return gathered[part * HEADS + i / QUARTERS]; }, whole);
        write_attended(reinterpret_cast<u8*>(attended + 4 * i), sum, whole.total);
    }
}
