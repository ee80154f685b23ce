// What a block of rolling attention's prefill works on: its queries, and the keys and values that they see, tile by
// tile.
//
// A block has QUERY_ROWS rows: 2^heads_shift query heads of one KV head, one token after the other, so that as many
// rows as possible read the same keys. Tiles of keys begin at positions that are multiples of KEY_TILE, wherever the
// chunk begins: a token's sums are formed in the same order however its text was divided into chunks.
#pragma once
#include "rolling_ring.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#define ACTIVATION BFloat16
#define RING BFloat16
#define WARPS 4         // of a block
#define ROW_BLOCKS 2    // blocks of 16 query rows of a warp
#define KEY_TILE 64     // a multiple of 16
#define HELD_QUERIES 0  // 1: queries stay in registers, and their shared memory is that of keys and values
#endif

constexpr u32 THREADS = 32 * WARPS, WARP_ROWS = 16 * ROW_BLOCKS, QUERY_ROWS = WARPS * WARP_ROWS;
// A row of shared memory has 16 bytes to spare, and an odd number of 16-byte units: eight rows at the same column,
// which is what ldmatrix reads at once, lie in different banks.
constexpr u32 ROW_BYTES = 2 * HEAD_DIM + 16, TILE_BYTES = KEY_TILE * ROW_BYTES;

constexpr bool CONVERTED = !Same<ACTIVATION, RING>::value;  // the ring's type is not that of activations
// Converted tiles come as they lie in the ring, row after row, and are then spread out as activations.
constexpr u32 RING_ROW_BYTES = HEAD_DIM * sizeof(RING);
constexpr u32 ARRIVING_ROW_BYTES = CONVERTED ? RING_ROW_BYTES : ROW_BYTES;
constexpr u32 ARRIVING_BYTES = 2 * KEY_TILE * ARRIVING_ROW_BYTES;  // keys, then values
constexpr u32 QUERY_BYTES = HELD_QUERIES ? 0 : QUERY_ROWS * ROW_BYTES;
constexpr u32 CONVERTED_BYTES = CONVERTED ? 2 * TILE_BYTES : 0;
// Shared memory: queries, converted keys and values, two arriving tiles of keys and values. Held queries pass through
// what the others lie in afterwards, and results leave through it.

struct RollingPrefillParams {
    const ACTIVATION* query;  // [B, T, H, D], rotated
    const RING* key_ring;     // [B, G, S, D]
    const RING* value_ring;   // [B, G, S, D]
    ACTIVATION* attended;     // [B, T, H, D]
    const i64* start;         // [B]
    const i64* count;         // [B]
    float scale_to_base_2;    // the scale of scores, times log2(e)
    u32 batch, tokens, heads, kv_heads, slots;
    u32 window;       // more than any position where attention is full
    u32 heads_shift;
};

// Where a block's rows lie. Row r is token `first_token` + (r >> heads_shift) and head `first_head` + the rest of r.
struct alignas(16) QueryTile {
    u32 row, first_head, first_token;
    u32 valid_rows;  // rows of tokens below count

    // In elements, from the start of query and attended.
    DEVICE i64 offset(const RollingPrefillParams& params, u32 r) const {
        const u32 token = first_token + (r >> params.heads_shift);
        const u32 head = first_head + (r & ((1u << params.heads_shift) - 1));
        return ((i64(row) * params.tokens + token) * params.heads + head) * HEAD_DIM;
    }
};

// Of block x. The last tokens come first, since they see the most; blocks of one KV head are neighbours.
DEVICE QueryTile query_tile(const RollingPrefillParams& params, u32 x) {
    const u32 head_tiles = params.heads >> params.heads_shift, tile_tokens = QUERY_ROWS >> params.heads_shift;
    const u32 tiles = (params.tokens + tile_tokens - 1) / tile_tokens;
    const u32 each = params.batch * head_tiles, at = x % each;
    QueryTile tile;
    tile.row = at / head_tiles;
    tile.first_head = (at % head_tiles) << params.heads_shift;
    tile.first_token = (tiles - 1 - x / each) * tile_tokens;
    const i64 count = min(params.count[tile.row], i64(params.tokens)) - i64(tile.first_token);
    tile.valid_rows = u32(max(i64(0), min(count, i64(tile_tokens)))) << params.heads_shift;
    return tile;
}

// What waits for the loop's end in the bytes that the first two rows have to spare, since registers are short: the
// tile, and whether a value that is not finite was met.
DEVICE QueryTile& kept_tile(u8* shared) {
    static_assert(sizeof(QueryTile) == ROW_BYTES - 2 * HEAD_DIM, "it must not reach into the second row");
    return *reinterpret_cast<QueryTile*>(shared + 2 * HEAD_DIM);
}
DEVICE u32& faults_met(u8* shared) { return *reinterpret_cast<u32*>(shared + ROW_BYTES + 2 * HEAD_DIM); }

// The positions that a block's valid rows see, counted from that of the first tile, and where they lie.
struct KeyRange {
    u32 first, end;
    u32 query;  // position of the block's first token
    u32 head;   // the KV head's first row in the rings
    u32 shift;  // from a position to its slot, and S more where the ring wraps in between

    DEVICE u32 ring_row(u32 position, u32 slots) const {  // of one that is seen
        const u32 slot = position + shift;
        return head + min(slot, slot - slots);  // the difference is huge where there is no wrap
    }
};

DEVICE KeyRange key_range(const RollingPrefillParams& params, const QueryTile& tile) {
    const i64 query = params.start[tile.row] + tile.first_token;
    const i64 first = max(i64(0), query - params.window + 1);
    const i64 base = first - first % KEY_TILE;
    const u32 kv_head = tile.first_head / (params.heads / params.kv_heads);
    KeyRange range;
    range.first = u32(first - base);
    range.query = u32(query - base);
    range.end = range.query + (tile.valid_rows >> params.heads_shift);
    range.head = (tile.row * params.kv_heads + kv_head) * params.slots;
    range.shift = u32(first % params.slots) - range.first;
    return range;
}

// Queries go to `shared`; rows that are not valid become zeros.
DEVICE void load_queries(u8* shared, const RollingPrefillParams& params, const QueryTile& tile) {
    constexpr u32 CHUNKS = HEAD_DIM / 8;
#pragma unroll 4
    for (u32 i = thread_x(); i < QUERY_ROWS * CHUNKS; i += THREADS) {
        const u32 r = i / CHUNKS, chunk = i % CHUNKS;
        const bool valid = r < tile.valid_rows;
        const ACTIVATION* const from = params.query + (valid ? tile.offset(params, r) + 8 * chunk : 0);
        copy_async_16(shared + r * ROW_BYTES + 16 * chunk, from, valid);
    }
    copy_async_commit();
}

// Keys and values of the positions from `begin` on go to `arriving`. What is not seen is not read and becomes zeros.
// LANES threads share a row. FIRST: of the first tile, where alone positions can be too early.
template <bool FIRST>
DEVICE void load_keys(u8* arriving, const RollingPrefillParams& params, const KeyRange& range, u32 begin) {
    constexpr u32 CHUNKS = RING_ROW_BYTES / 16, EACH = 16 / sizeof(RING), VALUES = KEY_TILE * ARRIVING_ROW_BYTES;
    constexpr u32 LANES = CHUNKS >= 8 ? 8 : CHUNKS >= 4 ? 4 : CHUNKS >= 2 ? 2 : 1, ROWS = THREADS / LANES;
    const u32 first_row = thread_x() / LANES, first_chunk = thread_x() % LANES;
#pragma unroll
    for (u32 pass = 0; pass < (KEY_TILE + ROWS - 1) / ROWS; pass++) {
        const u32 r = first_row + pass * ROWS, position = begin + r;
        if (KEY_TILE % ROWS && r >= KEY_TILE) break;
        const bool seen = position < range.end && (!FIRST || position >= range.first);
        const i64 from = i64(seen ? range.ring_row(position, params.slots) : 0) * HEAD_DIM + EACH * first_chunk;
        u8* const to = arriving + r * ARRIVING_ROW_BYTES + 16 * first_chunk;
#pragma unroll
        for (u32 chunk = 0; chunk < CHUNKS; chunk += LANES) {
            if (CHUNKS % LANES && first_chunk + chunk >= CHUNKS) break;
            copy_async_16(to + 16 * chunk, params.key_ring + from + EACH * chunk, seen);
            copy_async_16(to + VALUES + 16 * chunk, params.value_ring + from + EACH * chunk, seen);
        }
    }
    copy_async_commit();
}

// What arrived, as activations: [KEY_TILE] rows of keys, then of values.
DEVICE void convert_keys(u8* converted, const u8* arriving) {
    constexpr u32 CHUNKS = RING_ROW_BYTES / 16, VECTORS = 2 / sizeof(RING);  // of 16 bytes that one becomes
#pragma unroll 2
    for (u32 i = thread_x(); i < 2 * KEY_TILE * CHUNKS; i += THREADS) {
        const Vector16 given = reinterpret_cast<const Vector16*>(arriving)[i];
        Vector16* const to =
            reinterpret_cast<Vector16*>(converted + i / CHUNKS * ROW_BYTES) + i % CHUNKS * VECTORS;
#pragma unroll
        for (u32 v = 0; v < VECTORS; v++) {
            Vector16 out;
#pragma unroll
            for (u32 w = 0; w < 4; w++) {
                if constexpr (sizeof(RING) == 1) {
                    out.word[w] = widen_two<ACTIVATION>(given.word[2 * v + w / 2] >> (16 * (w % 2)));
                } else {
                    out.word[w] = widened_two<RING, ACTIVATION>(given.word[w]);
                }
            }
            to[v] = out;
        }
    }
}
