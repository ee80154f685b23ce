// The experts' matrices, as they are stored: of the activations' type, or packed into 4 or 8 bits with scales.
#pragma once
#include "vectors.cuh"

#ifndef BITS
#define BITS 16  // or 4, 8: then with SCALE, the type of the scales, and ZEROS, whether there are zero points
#endif
#ifndef SCALE
#define SCALE float
#define ZEROS 0
#endif

// [E, R, columns], or packed: numbers [E, R, B, b], scale [E, R, B], zero [E, R, Z] or null (see QuantizedMatMul).
struct Matrix {
    const u8* numbers;
    const SCALE* scale;
    const u8* zero;
};

#if BITS != 16
constexpr u32 NUMBERS = 128 / BITS;     // in 16 bytes
constexpr float LEVELS = 1 << BITS;

// Row `index` of all experts' rows. A block is `block` numbers and has its scale and zero point.
struct PackedRow {
    const u8* numbers;
    const SCALE* scale;
    const u8* zero;
};

DEVICE PackedRow packed_row(const Matrix& matrix, u64 index, u32 columns, u32 block) {
    const u32 blocks = (columns + block - 1) / block;
    return {matrix.numbers + index * blocks * (block * BITS / 8), matrix.scale + index * blocks,
            ZEROS ? matrix.zero + index * ((blocks * BITS + 7) / 8) : nullptr};
}

DEVICE float zero_point(const PackedRow& row, u32 block) {
    if (!ZEROS) return LEVELS / 2;
    const u32 byte = row.zero[block * BITS / 8];
    return float(BITS == 8 ? byte : byte >> (block % 2 * 4) & 15);
}

// 1 + q / LEVELS for number i of a word, which the bits of a float hold as they are.
DEVICE float one_and_part(u32 word, int i) {
    const int shift = 23 - BITS - BITS * i;
    const u32 moved = shift >= 0 ? word << (shift & 31) : word >> (-shift & 31);
    return bits_float(0x3f800000u | (moved & (0x7fffffu & ~((1u << (23 - BITS)) - 1))));
}
#endif
