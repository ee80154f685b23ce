// Few tokens: dot products of the chosen experts' rows, each loaded once for all tokens that chose the expert.
#pragma once
#include "vectors.cuh"

constexpr u32 NOT_CHOSEN = 0xff;  // in place of an assignment n·K + k, of which there are at most 128
constexpr u32 MOST_ASSIGNMENTS = 128;

// An assignment's expert, or -1 where nothing is to be read: the weight is zero, or there is no such expert.
DEVICE int expert_to_read(const i64* expert, const float* weight, u32 assignment, u32 experts) {
    const i64 e = expert[assignment];
    return weight[assignment] != 0.0f && e >= 0 && e < i64(experts) ? int(e) : -1;
}

DEVICE Vector16 nothing_16() {
    Vector16 v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.word[i] = 0;
    return v;
}

// sum[n][r] += row r of a matrix · row n of x, over the vectors `first`, `first` + `step`, ... below `vectors`, for the
// tokens n whose bit is set. The order of additions depends on `vectors` and `step` alone. UNROLL × ROWS loads of the
// matrix are under way before the first is used.
template <typename T, int TOKENS, int ROWS, int UNROLL>
DEVICE void add_products(float (&sum)[TOKENS][ROWS], const T* const (&row)[ROWS], const T* const (&x)[TOKENS],
                         u32 tokens, u32 first, u32 step, u32 vectors) {
    for (u32 at = first; at < vectors; at += UNROLL * step) {
        Vector16 loaded[UNROLL][ROWS];
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                loaded[u][r] = at + u * step < vectors ? load_16_once(row[r] + 8 * u64(at + u * step)) : nothing_16();
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
            if (TOKENS > 1 && !(tokens >> n & 1)) continue;
            Vector16 beside[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++)
                beside[u] = at + u * step < vectors ? load_16(x[n] + 8 * u64(at + u * step)) : nothing_16();
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                float wide[8];
                widen<T>(wide, beside[u]);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float weights[8];
                    widen<T>(weights, loaded[u][r]);
#pragma unroll
                    for (int i = 0; i < 8; i++) sum[n][r] = multiply_add(weights[i], wide[i], sum[n][r]);
                }
            }
        }
    }
}
