// A warp's query rows against one tile of keys and values: scores, softmax as it goes (Milakov and Gimelshein 2018,
// arXiv:1805.02867), weighted sums of values (Dao 2023, arXiv:2307.08691).
//
// Weights are rounded to the activation type, as tensor cores need it, and a row's total is the sum of the rounded
// ones, by the tensor cores too: what rounding does to a weight it then does to both, and values that are all alike
// come out as they are. A row's weights are relative to 2^top, which follows the highest score so far only when that is
// more than 2^SLACK above: nearly all tiles then leave the sums as they are. All of it depends on the row's own scores
// alone.
#pragma once
#include "rolling_prefill_tiles.cuh"

DEVICE float least() { return bits_float(0xff7fffffu); }     // of finite numbers
DEVICE float no_score() { return bits_float(0xff800000u); }  // minus infinity
constexpr float SLACK = 8.0f;
constexpr bool HALF = Same<ACTIVATION, Float16>::value;
// Float16 ends at 2^-24: its weights lie between 2^-30 of the highest and 2^14.
constexpr float LIFT = HALF ? 6.0f : 0.0f;
constexpr u32 ONE = HALF ? 0x3c00u : 0x3f80u, EXPONENT = HALF ? 0x7c00u : 0x7f80u;
constexpr u32 KEY_BLOCKS = KEY_TILE / 8, KEY_STEPS = KEY_TILE / 16;
constexpr u32 DIM_BLOCKS = HEAD_DIM / 8, DIM_STEPS = HEAD_DIM / 16;

// By the fragments of mma: element e of a block of 16 rows by 8 columns is row g + 8 (e / 2), column 2t + e % 2.
struct Rows {
    float sum[ROW_BLOCKS][DIM_BLOCKS][4];
    float total[ROW_BLOCKS][2], top[ROW_BLOCKS][2];  // of the rows g and g + 8
};
struct Queries {
    u32 held[HELD_QUERIES ? DIM_STEPS : 1][ROW_BLOCKS][4];
    const u8* shared;  // this lane's row
};
typedef float Scores[ROW_BLOCKS][KEY_BLOCKS][4];

// The lane's row and half of it, of the 16 × 16 that ldmatrix brings as an operand of mma: as queries (and, transposed,
// values) and as keys.
DEVICE u32 row_of_lane() { return (lane() & 15) * ROW_BYTES + (lane() >> 4) * 16; }
DEVICE u32 key_of_lane() { return ((lane() & 7) + (lane() >> 4) * 8) * ROW_BYTES + ((lane() >> 3) & 1) * 16; }

DEVICE void hold(Queries& queries) {
    if constexpr (HELD_QUERIES) {
#pragma unroll
        for (u32 step = 0; step < DIM_STEPS; step++)
#pragma unroll
            for (u32 m = 0; m < ROW_BLOCKS; m++)
                load_matrices(queries.held[step][m], queries.shared + m * 16 * ROW_BYTES + step * 32);
    }
}

DEVICE void score_keys(Scores& score, const Queries& queries, const u8* keys) {
    const u8* const mine = keys + key_of_lane();
#pragma unroll
    for (u32 m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (u32 n = 0; n < KEY_BLOCKS; n++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) score[m][n][e] = 0.0f;
#pragma unroll
    for (u32 step = 0; step < DIM_STEPS; step++) {
        u32 query[ROW_BLOCKS][4];
#pragma unroll
        for (u32 m = 0; m < ROW_BLOCKS; m++) {
            if constexpr (HELD_QUERIES) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) query[m][i] = queries.held[step][m][i];
            } else {
                load_matrices(query[m], queries.shared + m * 16 * ROW_BYTES + step * 32);
            }
        }
#pragma unroll
        for (u32 n = 0; n < KEY_BLOCKS; n += 2) {
            u32 key[4];
            load_matrices(key, mine + n * 8 * ROW_BYTES + step * 32);
            const u32 low[2] = {key[0], key[1]}, high[2] = {key[2], key[3]};
#pragma unroll
            for (u32 m = 0; m < ROW_BLOCKS; m++) {
                mma_16x8x16<ACTIVATION>(score[m][n], query[m], low);
                mma_16x8x16<ACTIVATION>(score[m][n + 1], query[m], high);
            }
        }
    }
}

// Where a score is far above its row's top, the top moves there and what was summed is put in relation to it.
DEVICE void follow(Rows& rows, const Scores& score, float scale_to_base_2) {
#pragma unroll
    for (u32 m = 0; m < ROW_BLOCKS; m++) {
        float factor[2];
        bool higher = false;
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            float highest = no_score();
#pragma unroll
            for (u32 n = 0; n < KEY_BLOCKS; n++)
                highest = max(highest, max(score[m][n][2 * h], score[m][n][2 * h + 1]));
            highest = max(highest, shuffle_xor(highest, 1));
            highest = max(highest, shuffle_xor(highest, 2)) * scale_to_base_2;
            const bool raised = highest > rows.top[m][h] + SLACK;
            factor[h] = raised ? exp2_fast(rows.top[m][h] - highest) : 1.0f;
            rows.top[m][h] = raised ? highest : rows.top[m][h];
            higher |= raised;
        }
        if (ballot(higher)) {
#pragma unroll
            for (u32 h = 0; h < 2; h++) rows.total[m][h] *= factor[h];
#pragma unroll
            for (u32 n = 0; n < DIM_BLOCKS; n++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) rows.sum[m][n][e] *= factor[e / 2];
        }
    }
}

// The weights of a step's 16 keys as mma's first operand. A score that is NaN is a weight that is NaN.
DEVICE void weigh(u32 (&weight)[ROW_BLOCKS][4], const Rows& rows, const Scores& score, float scale_to_base_2,
                  u32 step) {
#pragma unroll
    for (u32 m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const float(&block)[4] = score[m][2 * step + i / 2];
            const u32 h = i & 1;
            const float low = multiply_add(block[2 * h], scale_to_base_2, LIFT - rows.top[m][h]);
            const float high = multiply_add(block[2 * h + 1], scale_to_base_2, LIFT - rows.top[m][h]);
            weight[m][i] = pack_two<ACTIVATION>(exp2_fast(low), exp2_fast(high));
        }
}

// Bits 15 and 31, where the low and high element is infinite or NaN: its exponent's bits are all ones.
DEVICE u32 not_finite(u32 two) {
    constexpr u32 MASK = EXPONENT | EXPONENT << 16, LAST = EXPONENT & (0u - EXPONENT);
    return ((two & MASK) + (LAST | LAST << 16)) & 0x80008000u;
}

// Returns whether this lane met a value that is not finite. FINITE_ONLY: such values are taken for zero.
template <bool FINITE_ONLY>
DEVICE bool add_values(Rows& rows, const Scores& score, float scale_to_base_2, const u8* values) {
    const u8* const mine = values + row_of_lane();
    const u32 ones[2] = {ONE | ONE << 16, ONE | ONE << 16};
    u32 found = 0;
    float total[ROW_BLOCKS][4];  // the same in all columns
#pragma unroll
    for (u32 m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (u32 e = 0; e < 4; e++) total[m][e] = rows.total[m][e / 2];
#pragma unroll
    for (u32 step = 0; step < KEY_STEPS; step++) {
        u32 weight[ROW_BLOCKS][4];
        weigh(weight, rows, score, scale_to_base_2, step);
#pragma unroll
        for (u32 m = 0; m < ROW_BLOCKS; m++) mma_16x8x16<ACTIVATION>(total[m], weight[m], ones);
#pragma unroll
        for (u32 n = 0; n < DIM_BLOCKS; n += 2) {
            u32 value[4];
            load_matrices_transposed(value, mine + step * 16 * ROW_BYTES + n * 16);
            if constexpr (FINITE_ONLY) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 odd = not_finite(value[i]);
                    found |= odd;
                    value[i] &= ~((odd >> 15) * 0xffffu);
                }
            }
            const u32 low[2] = {value[0], value[1]}, high[2] = {value[2], value[3]};
#pragma unroll
            for (u32 m = 0; m < ROW_BLOCKS; m++) {
                mma_16x8x16<ACTIVATION>(rows.sum[m][n], weight[m], low);
                mma_16x8x16<ACTIVATION>(rows.sum[m][n + 1], weight[m], high);
            }
        }
    }
#pragma unroll
    for (u32 m = 0; m < ROW_BLOCKS; m++)
#pragma unroll
        for (u32 h = 0; h < 2; h++) rows.total[m][h] = total[m][2 * h];
    return found != 0;
}
