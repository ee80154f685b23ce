// A tile of weights of the activations' type: it goes into shared memory as it is.
#pragma once
#include "moe_gemm.cuh"

constexpr u32 RAW_BYTES = TILE_WEIGHTS * DEPTH * 2, UNPACKED_BYTES = 0;  // of a stage; and beside the stages
constexpr int COPIES_OF_WEIGHTS = TILE_WEIGHTS * VECTORS / THREADS;

// What a thread copies in every stage: one vector of several rows, THREADS / VECTORS rows apart.
using WeightCopies = VectorCopies<COPIES_OF_WEIGHTS>;

DEVICE WeightCopies plan_weights(const Matrix& gate, const Matrix& up, u32 expert, u32 column_tile, u32 width,
                                 u32 depth, u32) {
    WeightCopies copies;
    copies.there = 0;
#pragma unroll
    for (int j = 0; j < COPIES_OF_WEIGHTS; j++) {
        const TileRow row = tile_row(thread_x() / VECTORS + THREADS / VECTORS * j, column_tile);
        const bool there = row.column < width;
        const u8* matrix = row.of_up ? up.numbers : gate.numbers;
        copies.from[j] = reinterpret_cast<const ELEMENT*>(matrix) +
                           (u64(expert) * width + (there ? row.column : 0)) * depth;
        copies.there |= there ? 1u << j : 0u;
    }
    return copies;
}

DEVICE void copy_weights(u8* raw, const WeightCopies& copies, u32 at, u32 depth) {
    copy_vectors(raw, copies, at, depth);
}

// The stage's weights as fragments are loaded from them.
DEVICE const u8* weights_of_stage(const u8* raw, u8*, const WeightCopies&, u32) { return raw; }
