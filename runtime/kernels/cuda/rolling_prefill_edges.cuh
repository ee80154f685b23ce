// Tiles at the edge of the window or of what is past: some rows see some of the keys, and what they do not see must not
// be felt. A hidden score is replaced, whatever it is. A hidden value has weight 0, but 0 · NaN is NaN: in tiles at the
// edge, values that are not finite are taken for zero, and where there were any, NaN is put where they are seen, at the
// end, one value after the other. (That hardly ever happens, and must cost the loop no registers.)
#pragma once
#include "rolling_prefill_rows.cuh"

// What this lane's rows see of a tile: positions that they are less than `window` ahead of, and not behind.
struct Sight {
    u32 first_row, heads_shift, query, window;  // query: the position of the block's first token, from the tile's first

    DEVICE bool sees(u32 block, u32 half, u32 key) const {
        const u32 r = first_row + 16 * block + 8 * half;
        return query + (r >> heads_shift) - key < window;
    }
};

DEVICE void hide_unseen(Scores& score, const Sight& sight) {
#pragma unroll
    for (u32 m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (u32 n = 0; n < KEY_BLOCKS; n++)
#pragma unroll
            for (u32 e = 0; e < 4; e++)
                if (!sight.sees(m, e / 2, 8 * n + 2 * (lane() & 3) + (e & 1))) score[m][n][e] = no_score();
}

// Results of the warp's rows, in shared memory, that saw a value that is not finite. A lane has columns of its own.
DEVICE void mark_seen_faults(u8* results, const RollingPrefillParams& params, const KeyRange& range) {
    const u32 first = warp() * WARP_ROWS;
    for (u32 position = range.first; position < range.end; position++) {
        const RING* const value = params.value_ring + i64(range.ring_row(position, params.slots)) * HEAD_DIM;
        for (u32 d = lane(); d < HEAD_DIM; d += 32) {
            const float x = to_float(from_float<ACTIVATION>(to_float(value[d])));
            if (x - x == 0.0f) continue;
            for (u32 r = first; r < first + WARP_ROWS; r++)
                if (range.query + (r >> params.heads_shift) - position < params.window)
                    reinterpret_cast<ACTIVATION*>(results + r * ROW_BYTES)[d] =
                        from_float<ACTIVATION>(bits_float(0x7fc00000u));
        }
    }
}
