// RollingAttention for several tokens, after the chunk's keys and values were written: flash attention over the ring.
//
// Keys are taken in order of position, two tiles under way at a time; tiles that no query of the block sees are never
// loaded. Tokens from `count` on give zeros.
#include "rolling_prefill_edges.cuh"

// The block's rows of tokens that do not count.
DEVICE void store_zeros(const RollingPrefillParams& params, const QueryTile& tile) {
    const u32 tokens = min(params.tokens - tile.first_token, QUERY_ROWS >> params.heads_shift);
    const u32 rows = (tokens << params.heads_shift) - tile.valid_rows;
    Vector16 zeros;
#pragma unroll
    for (u32 w = 0; w < 4; w++) zeros.word[w] = 0;
    for (u32 i = thread_x(); i < rows * DIM_BLOCKS; i += THREADS)
        store_16(params.attended + tile.offset(params, tile.valid_rows + i / DIM_BLOCKS) + i % DIM_BLOCKS * 8, zeros);
}

// The warp's rows, to shared memory: so they leave as whole rows.
DEVICE void gather_rows(u8* results, const Rows& rows) {
    const u32 first = warp() * WARP_ROWS, g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (u32 m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            const float inverse = reciprocal(rows.total[m][h]);
            u8* const to = results + (first + 16 * m + 8 * h + g) * ROW_BYTES + 4 * t;
#pragma unroll
            for (u32 n = 0; n < DIM_BLOCKS; n++)
                *reinterpret_cast<u32*>(to + 16 * n) =
                    pack_two<ACTIVATION>(rows.sum[m][n][2 * h] * inverse, rows.sum[m][n][2 * h + 1] * inverse);
        }
    warp_sync();
}

DEVICE void store_rows(const u8* results, const RollingPrefillParams& params, const QueryTile& tile) {
    const u32 first = warp() * WARP_ROWS;
    for (u32 i = lane(); i < WARP_ROWS * DIM_BLOCKS; i += 32) {
        const u32 r = first + i / DIM_BLOCKS, chunk = i % DIM_BLOCKS;
        if (r < tile.valid_rows)
            store_16(params.attended + tile.offset(params, r) + 8 * chunk,
                     *reinterpret_cast<const Vector16*>(results + r * ROW_BYTES + 16 * chunk));
    }
}

CIERZO_KERNEL(rolling_prefill, RollingPrefillParams, THREADS) {
    CIERZO_SHARED(shared);
    const QueryTile tile = query_tile(params, block_x());
    store_zeros(params, tile);
    if (tile.valid_rows == 0) return;
    if (thread_x() == 0) {
        kept_tile(shared) = tile;
        faults_met(shared) = 0;
    }
    const KeyRange range = key_range(params, tile);
    u8* const converted = shared + QUERY_BYTES;
    u8* const arriving = converted + CONVERTED_BYTES;

    Queries queries;
    queries.shared = shared + warp() * WARP_ROWS * ROW_BYTES + row_of_lane();
    load_queries(shared, params, tile);
    if constexpr (HELD_QUERIES) {
        copy_async_wait<0>();
        block_sync();
        hold(queries);
        block_sync();
    }
    Rows rows;
#pragma unroll
    for (u32 m = 0; m < ROW_BLOCKS; m++) {
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            rows.top[m][h] = least();
            rows.total[m][h] = 0.0f;
        }
#pragma unroll
        for (u32 n = 0; n < DIM_BLOCKS; n++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) rows.sum[m][n][e] = 0.0f;
    }
    // Positions of the warp's first and last valid row. (A warp without any may do what it likes.)
    const u32 first_row = warp() * WARP_ROWS, last_row = min(first_row + WARP_ROWS, tile.valid_rows) - 1;
    const u32 nearest = range.query + (first_row >> params.heads_shift);
    const u32 furthest = first_row <= last_row ? range.query + (last_row >> params.heads_shift) : 0;

    u32 stage = 0;
    load_keys<true>(arriving, params, range, 0);
    for (u32 begin = 0; begin < range.end; begin += KEY_TILE) {
        copy_async_wait<0>();
        block_sync();
        const u8* keys = arriving + stage;
        stage = ARRIVING_BYTES - stage;
        if (begin + KEY_TILE < range.end) load_keys<false>(arriving + stage, params, range, begin + KEY_TILE);
        if constexpr (CONVERTED) {
            convert_keys(converted, keys);
            block_sync();
            keys = converted;
        }
        const u8* const values = keys + TILE_BYTES;
        const u32 last = begin + KEY_TILE - 1;
        if (begin > furthest || nearest >= last + params.window) continue;  // no row of the warp sees any of it
        Scores score;
        score_keys(score, queries, keys);
        const float scale = params.scale_to_base_2;
        if (last <= nearest && furthest < begin + params.window) {
            follow(rows, score, scale);
            add_values<false>(rows, score, scale, values);
        } else {
            const u32 query = nearest - (first_row >> params.heads_shift);
            const Sight sight = {first_row + lane() / 4, params.heads_shift, query - begin, params.window};
            hide_unseen(score, sight);
            follow(rows, score, scale);
            if (add_values<true>(rows, score, scale, values)) faults_met(shared) = 1;
        }
    }
    block_sync();
    gather_rows(shared, rows);
    const QueryTile kept = kept_tile(shared);
    if (faults_met(shared)) {
        mark_seen_faults(shared, params, key_range(params, kept));
        warp_sync();
    }
    store_rows(shared, params, kept);
}
