// The grouped product of MixtureOfExperts for many tokens: each expert's tokens times its matrix, on tensor cores.
//
// With GATED = 1 a tile of weights is 64 rows of gate and the same 64 of up, and act(gate) ⊙ up of x's rows is stored;
// with GATED = 0 it is 128 rows of down, and products of hidden's rows are stored as floats. Sums run over the columns
// in order, 16 at a time, whatever the tile: a row's bits depend on that row and on its expert's matrices alone.
#ifndef ELEMENT
#define ELEMENT BFloat16
#define GATED_BY silu
#define GATED 1
#define TILE_ROWS 128  // or 64, 32 for experts with few tokens each
#define STAGES 4       // of the pipeline into shared memory
#endif
#include "activations.cuh"
#include "moe_matrix.cuh"
#if BITS == 16
#include "moe_gemm_weights.cuh"
#else
#include "moe_gemm_packed_weights.cuh"
#endif

#if GATED
typedef ELEMENT Result;
#else
typedef float Result;
#endif

struct GemmParams {
    const ELEMENT* source;  // x [N, C] where GATED, hidden [N, K, I] where not
    Matrix gate;            // [E, I, C], or down [E, C, I]
    Matrix up;              // [E, I, C], or nulls
    Result* result;         // hidden [N, K, I], or products [N, K, C]
    const u32* list;        // [E, N], of moe_route
    const u32* count;       // [E]
    u32 tokens, experts;
    u32 per_row;            // how many assignments share a row of `source`: K, or 1
    u32 depth, width;       // columns and rows of an expert's matrix
    u32 together, column_tiles, block;
};

constexpr u32 STAGE_BYTES = ROWS_BYTES + RAW_BYTES;
constexpr int COPIES_OF_ROWS = TILE_ROWS * VECTORS / THREADS;
constexpr int RESULT_FRAGMENTS = WEIGHT_FRAGMENTS / MATRICES;  // of gate; those of up for the same columns follow

struct alignas(8) TwoFloats { float first, second; };
DEVICE void store_two(float* to, float first, float second) {
    *reinterpret_cast<TwoFloats*>(to) = TwoFloats{first, second};
}
DEVICE void store_two(ELEMENT* to, float first, float second) {
    *reinterpret_cast<u32*>(to) = pack_two<ELEMENT>(first, second);
}

// What a thread copies of the tokens in every stage: one vector of several rows, THREADS / VECTORS rows apart.
using RowCopies = VectorCopies<COPIES_OF_ROWS>;

DEVICE RowCopies plan_rows(const GemmParams& params, const TilePlace& place) {
    RowCopies copies;
    copies.there = 0;
#pragma unroll
    for (int j = 0; j < COPIES_OF_ROWS; j++) {
        const u32 r = thread_x() / VECTORS + THREADS / VECTORS * j;
        const bool there = r < place.rows;
        copies.from[j] = params.source + u64(there ? place.assignment[r] / params.per_row : 0) * params.depth;
        copies.there |= there ? 1u << j : 0u;
    }
    return copies;
}

DEVICE void store_tile(const GemmParams& params, const TilePlace& place, u32 column_tile,
                       const float (&sum)[ROW_FRAGMENTS][WEIGHT_FRAGMENTS][4]) {
    const u32 first_row = warp() / WARPS_ACROSS * (ROW_FRAGMENTS * 16) + lane() / 4;
    const u32 first_column =
        column_tile * WIDTH + warp() % WARPS_ACROSS * (RESULT_FRAGMENTS * 8) + lane() % 4 * 2;
#pragma unroll
    for (int m = 0; m < ROW_FRAGMENTS; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 r = first_row + 16 * m + 8 * half;
            if (r >= place.rows) continue;
            Result* row = params.result + u64(place.assignment[r]) * params.width;
#pragma unroll
            for (int n = 0; n < RESULT_FRAGMENTS; n++) {
                const u32 column = first_column + 8 * n;
                if (column >= params.width) continue;
                float first = sum[m][n][2 * half], second = sum[m][n][2 * half + 1];
#if GATED
                first = activation::GATED_BY(first) * sum[m][n + RESULT_FRAGMENTS][2 * half];
                second = activation::GATED_BY(second) * sum[m][n + RESULT_FRAGMENTS][2 * half + 1];
#endif
                store_two(row + column, first, second);
            }
        }
    }
}

CIERZO_KERNEL(moe_gemm, GemmParams, THREADS) {
    CIERZO_SHARED(memory);
    u8* const stages = memory;
    u8* const unpacked = memory + STAGES * STAGE_BYTES;
    TilePlace& place = *reinterpret_cast<TilePlace*>(unpacked + UNPACKED_BYTES);
    u32 row_tile, column_tile;
    block_tile(row_tile, column_tile, params.together, params.column_tiles);
    find_tile(place, row_tile, params.count, params.list, params.experts, params.tokens);
    if (place.rows == 0) return;
    const RowCopies rows = plan_rows(params, place);
    const WeightCopies weights = plan_weights(params.gate, params.up, place.expert, column_tile, params.width,
                                              params.depth, params.block);
    const u32 steps = (params.depth + DEPTH - 1) / DEPTH;
    u32 now = 0, next = 0;
    float sum[ROW_FRAGMENTS][WEIGHT_FRAGMENTS][4] = {};
    for (u32 copied = 0; copied < STAGES - 1; copied++, next++) {
        if (copied < steps) {
            copy_vectors(stages + next * STAGE_BYTES, rows, copied * DEPTH, params.depth);
            copy_weights(stages + next * STAGE_BYTES + ROWS_BYTES, weights, copied * DEPTH, params.depth);
        }
        copy_async_commit();
    }
    for (u32 step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        block_sync();  // this stage is there for all, and the one before has been used by all
        const u32 ahead = step + STAGES - 1;
        if (ahead < steps) {
            copy_vectors(stages + next * STAGE_BYTES, rows, ahead * DEPTH, params.depth);
            copy_weights(stages + next * STAGE_BYTES + ROWS_BYTES, weights, ahead * DEPTH, params.depth);
        }
        copy_async_commit();
        const u8* stage = stages + now * STAGE_BYTES;
        multiply_stage<ELEMENT>(sum, stage, weights_of_stage(stage + ROWS_BYTES, unpacked, weights, step * DEPTH));
        now = now + 1 == STAGES ? 0 : now + 1;
        next = next + 1 == STAGES ? 0 : next + 1;
    }
    store_tile(params, place, column_tile, sum);
}
