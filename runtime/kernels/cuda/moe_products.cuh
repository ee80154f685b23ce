// Dot products of rows of a matrix with the x of several tokens; the matrix is read once for all of them.
#pragma once
#if BITS == 16
#include "moe_rows.cuh"
#else
#include "moe_packed_rows.cuh"
#endif

// sum[n][r] += row r · x[n] over the 16 bytes `first`, `first` + `step`, ... of the rows, for the tokens n whose bit is
// set. The order of additions depends on `columns`, `block` and `step` alone.
template <int Tokens, int Rows, u32 Threads>
DEVICE void add_products(float (&sum)[Tokens][Rows], const Row (&row)[Rows], const ELEMENT* const (&x)[Tokens],
                         u32 tokens, u32 first, u32 step, u32 columns, u32 block, u8* slots) {
    const u32 pieces = (columns + NUMBERS - 1) / NUMBERS;
    const u8* from[Rows];
#pragma unroll
    for (int r = 0; r < Rows; r++) from[r] = row[r].numbers;
    Pipe<Rows, Threads> pipe(slots);
#pragma unroll
    for (u32 ahead = 0; ahead < PIPE - 1; ahead++) pipe.fill(from, first + ahead * step, pieces);
#pragma unroll 1
    for (u32 at = first; at < pieces; at += step) {
        Vector16 loaded[Rows];
        pipe.empty(loaded);
        pipe.fill(from, at + (PIPE - 1) * step, pieces);
        const Piece<Rows> piece(row, loaded, at, block);
#pragma unroll
        for (int n = 0; n < Tokens; n++)
            if (Tokens == 1 || (tokens >> n & 1)) piece.add(sum[n], x[n], at, columns);
    }
    copy_async_wait<0>();  // the slots are free again
}
