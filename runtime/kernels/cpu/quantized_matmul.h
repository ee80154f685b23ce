/* Rows of float32 times a matrix of 4-bit or 8-bit weights, for the operators that need it (a linear layer, experts).
 *
 * y[m, n] = sum over k of x[m, k] * w[n, k],  w[n, k] = scale[n, k / block] * (q[n, k] - zero[n, k / block])
 *
 * The activations are rounded to 8-bit numbers, a scale for each block of a row, as the weights are: with the block's
 * largest magnitude a, the scale is a / 127 and a number is x * (127 / a) to the nearest whole one, halves to the even
 * one (both quotients and the product in float32); a block with a < 2^-119 counts as zero. Products are summed in whole
 * numbers within a block, exactly, and in float32 from block to block. A NaN or an infinity makes its own row of y not
 * finite.
 */
#ifndef CIERZO_QUANTIZED_MATMUL_H
#define CIERZO_QUANTIZED_MATMUL_H

#include <stddef.h>
#include <stdint.h>

/* How rounded activations lie: as suits their number, or always in one way, so that a token's bits do not depend on how
 * many others are multiplied with the same matrix. */
typedef enum { LAYOUT_BY_NUMBER = 0, LAYOUT_BY_ROWS, LAYOUT_BY_TOKENS } QuantizedLayout;

/* A matrix [N, K] as it lies in the file, in the layout of ONNX Runtime's MatMulNBits; blocks = ceil(K / block).
 *
 * packed  [N, blocks, block * bits / 8]; of two 4-bit numbers in a byte the first is the low half. The last block is
 *         filled up to its full length (with whatever: the activations there are zero).
 * scale   [N, blocks], float16 or float32
 * zero    NULL (then it is 8 for 4 bits, 128 for 8 bits everywhere), or [N, ceil(blocks * bits / 8)], packed likewise
 */
typedef struct QuantizedWeight {
    const uint8_t *packed;
    const void *scale;
    const uint8_t *zero;
    int64_t N, K, blocks;
    int bits, block, scale_is_half;
    QuantizedLayout layout;
} QuantizedWeight;

/* Checks sizes that a kernel relies on: bits 4 or 8, block a power of two from 16 to 256. NULL, or what is wrong. */
const char *quantized_weight_fault(const QuantizedWeight *);

/* Bytes that hold M rows of K activations after rounding, in whatever order suits M and this machine. */
size_t quantized_rows_bytes(int64_t M, const QuantizedWeight *);

/* How many calls of `quantize_rows` the M rows are divided into, so that threads can share them. */
size_t quantize_pieces(int64_t M, const QuantizedWeight *);

/* Rounds piece `piece` of x into `rows`. Row m is x + index[m] * stride, or x + m * stride where index is NULL. */
void quantize_rows(const float *x, int64_t stride, const int64_t *index, int64_t M, const QuantizedWeight *, void *rows,
                   size_t piece);

/* How many calls of `multiply_rows` give the whole product. */
size_t multiply_pieces(int64_t M, const QuantizedWeight *);

/* Columns of piece `piece` of y [M, N], whose rows are y_stride apart, from the rounded rows. */
void multiply_rows(const void *rows, int64_t M, const QuantizedWeight *, float *y, int64_t y_stride, size_t piece);

#endif
