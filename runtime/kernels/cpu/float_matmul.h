/* Rows of float32 times a matrix of float32, float16 or bfloat16 weights, for the operators that need it (a linear
 * layer, experts).
 *
 * y[m, n] = sum over k of x[m, k] * w[n, k], in float32; stored 16-bit weights are widened, which is exact.
 *
 * Up to FEW_ROWS rows are dot products along K: each weight is read once, at the speed of memory. More rows are packed
 * into panels of PANEL rows, a lane for each row, and the weights are the scalars that the lanes are multiplied with.
 */
#ifndef CIERZO_FLOAT_MATMUL_H
#define CIERZO_FLOAT_MATMUL_H

#include <stddef.h>
#include <stdint.h>

enum {
    FEW_ROWS = 8,
    FEW_BLOCK = 128,  /* most rows of weights that few_block gives */
    PANEL = 16,
    MOST_PANELS = 16, /* of one product: more rows are several products */
    BLOCK = 48,       /* rows of weights of one product of panels */
};

/* A matrix [N, K] as it lies in the file. type: TYPE_FLOAT, TYPE_FLOAT16 or TYPE_BFLOAT16 of abi.h. */
typedef struct StoredWeight {
    const void *data;
    int64_t N, K;
    int type;
} StoredWeight;

/* Bytes of one weight of this type. */
size_t stored_bytes(int type);

/* y[m * y_stride + n - first] for M <= FEW_ROWS rows and n = first ... first + count - 1. */
void multiply_few(const float *const *rows, int M, const StoredWeight *, int64_t first, int64_t count, float *y,
                  int64_t y_stride);

/* How many rows of this weight a thread should take at once where few rows of x are multiplied. */
int64_t few_block(const StoredWeight *);

/* Packs count <= PANEL rows of K numbers: panel [K, PANEL]. Lanes without a row are filled with copies of the first. */
void pack_panel(const float *const *rows, int count, int64_t K, float *panel);

/* The product of `panels` panels [panels, K, PANEL] with weight rows first ... first + count - 1, count <= BLOCK and
 * panels <= MOST_PANELS: sums [panels, BLOCK, PANEL], of which the rows from count on are left unspecified. */
void multiply_panels(const float *packed, int panels, const StoredWeight *, int64_t first, int count, float *sums);

/* Writes sums [panels, BLOCK, PANEL] as y[m * y_stride + n] for m < M and n < count. */
void unpack_sums(const float *sums, int64_t M, int count, float *y, int64_t y_stride);

#endif
