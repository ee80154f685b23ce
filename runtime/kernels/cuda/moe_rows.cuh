// Rows of matrices of the activations' type.
#pragma once
#include "moe_decode.cuh"

constexpr u32 NUMBERS = 8;  // in 16 bytes

struct Row {
    const u8* numbers;
};
DEVICE Row row_of(const Matrix& matrix, u64 index, u32 columns, u32) {
    return {matrix.numbers + index * columns * sizeof(ELEMENT)};
}

// What 16 bytes of each row add to the rows' sums, for each of several x.
template <int Rows> struct Piece {
    float weights[Rows][8];

    DEVICE Piece(const Row (&)[Rows], const Vector16 (&loaded)[Rows], u32, u32) {
#pragma unroll
        for (int r = 0; r < Rows; r++) widen<ELEMENT>(weights[r], loaded[r]);
    }
    DEVICE void add(float (&sum)[Rows], const ELEMENT* x, u32 piece, u32) const {
        float wide[8];
        widen<ELEMENT>(wide, load_16(x + 8 * u64(piece)));
#pragma unroll
        for (int r = 0; r < Rows; r++)
#pragma unroll
            for (int i = 0; i < 8; i++) sum[r] = multiply_add(weights[r][i], wide[i], sum[r]);
    }
};
