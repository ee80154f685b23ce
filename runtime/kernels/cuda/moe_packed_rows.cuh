// Rows of packed matrices: w = scale · (q - zero) over blocks of numbers.
#pragma once
#include "moe_decode.cuh"

typedef PackedRow Row;
DEVICE Row row_of(const Matrix& matrix, u64 index, u32 columns, u32 block) {
    return packed_row(matrix, index, columns, block);
}

// What 16 bytes of each row, which have one scale, add to the rows' sums, for each of several x.
//
// Of 1 + q / LEVELS, which takes no conversion, what is too much is taken off once for all of them: (1 + zero / LEVELS)
// times the sum of x. An infinite x gives NaN, as the operator's definition does.
template <int Rows> struct Piece {
    const Vector16 (&loaded)[Rows];
    float scale[Rows], offset[Rows];

    DEVICE Piece(const Row (&row)[Rows], const Vector16 (&loaded)[Rows], u32 piece, u32 block) : loaded(loaded) {
        const u32 of = piece * NUMBERS / block;
#pragma unroll
        for (int r = 0; r < Rows; r++) {
            scale[r] = LEVELS * to_float(row[r].scale[of]);
            offset[r] = -1.0f - zero_point(row[r], of) / LEVELS;
        }
    }
    DEVICE void add(float (&sum)[Rows], const ELEMENT* x, u32 piece, u32 columns) const {
        float part[Rows] = {}, total = 0.0f;
#pragma unroll
        for (int v = 0; v < int(NUMBERS / 8); v++) {
            const u32 vector = piece * (NUMBERS / 8) + v;
            float wide[8];
            widen<ELEMENT>(wide, vector < columns / 8 ? load_16(x + 8 * u64(vector)) : nothing_16());
#pragma unroll
            for (int i = 0; i < 8; i++) {
                constexpr int IN_WORD = 32 / BITS;
                const int number = 8 * v + i;
                total += wide[i];
#pragma unroll
                for (int r = 0; r < Rows; r++)
                    part[r] = multiply_add(one_and_part(loaded[r].word[number / IN_WORD], number % IN_WORD), wide[i],
                                           part[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < Rows; r++)
            sum[r] = multiply_add(scale[r], multiply_add(offset[r], total, part[r]), sum[r]);
    }
};
