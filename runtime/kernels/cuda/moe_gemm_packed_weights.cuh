// A tile of packed weights: its bytes go into shared memory, where each thread makes one row of the tile of them.
//
// scale · (q - zero) is rounded to the activations' type there, which is what tensor cores multiply.
#pragma once
#include "moe_gemm.cuh"

constexpr u32 ROW_BYTES = DEPTH * BITS / 8;
constexpr u32 RAW_BYTES = TILE_WEIGHTS * ROW_BYTES, UNPACKED_BYTES = TILE_WEIGHTS * DEPTH * 2;
static_assert(TILE_WEIGHTS == THREADS, "a thread has a row of the tile");

struct WeightCopies {
    PackedRow row;
    u32 block;
    bool there;
};

DEVICE WeightCopies plan_weights(const Matrix& gate, const Matrix& up, u32 expert, u32 column_tile, u32 width,
                                 u32 depth, u32 block) {
    const TileRow row = tile_row(thread_x(), column_tile);
    const bool there = row.column < width;
    const u64 index = u64(expert) * width + (there ? row.column : 0);
    return {packed_row(row.of_up ? up : gate, index, depth, block), block, there};
}

// A row has whole blocks, which are whole stages: `at` is inside where `depth` may end within the stage.
DEVICE void copy_weights(u8* raw, const WeightCopies& copies, u32 at, u32) {
#pragma unroll
    for (u32 i = 0; i < ROW_BYTES; i += 16)
        copy_async_16(raw + thread_x() * ROW_BYTES + i, copies.row.numbers + u64(at) * BITS / 8 + i, copies.there);
}

// A thread unpacks what it copied itself. All of them have used the `unpacked` of the stage before.
DEVICE const u8* weights_of_stage(const u8* raw, u8* unpacked, const WeightCopies& copies, u32 at) {
    const u32 block = at / copies.block;
    const float scale = to_float(copies.row.scale[block]);
    const float zero = zero_point(copies.row, block);
    Vector16 own[ROW_BYTES / 16];
#pragma unroll
    for (u32 i = 0; i < ROW_BYTES / 16; i++)
        own[i] = *reinterpret_cast<const Vector16*>(raw + thread_x() * ROW_BYTES + 16 * i);
#pragma unroll
    for (u32 v = 0; v < VECTORS; v++) {
        Vector16 vector;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            constexpr int IN_WORD = 32 / BITS;
            const int number = 8 * v + 2 * i;
            const u32 word = own[number / NUMBERS].word[number % NUMBERS / IN_WORD];
            // LEVELS · (1 + q / LEVELS) - (LEVELS + zero) is exact.
            const float low = LEVELS * one_and_part(word, number % IN_WORD) - (LEVELS + zero);
            const float high = LEVELS * one_and_part(word, number % IN_WORD + 1) - (LEVELS + zero);
            vector.word[i] = pack_two<ELEMENT>(scale * low, scale * high);
        }
        *reinterpret_cast<Vector16*>(unpacked + tile_offset(thread_x(), v)) = vector;
    }
    block_sync();
    return unpacked;
}
