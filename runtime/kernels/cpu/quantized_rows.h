/* How rounded activations lie in memory, and the products for each level of instructions: inside quantized_matmul.
 *
 * By rows (few tokens, or no AVX-512): lanes run along K, so that a row of weights is read as it lies in the file.
 *   values  int8  [M, width]    4 bits: 64 numbers of even k, then the 64 of odd k, for each 128 numbers, as the halves
 *                               of 64 bytes of weights; 8 bits and the portable level: in order
 *   scale   float [M, blocks]   of the activations' blocks
 *   start   int32 [M, starts]   -default_zero * the sum of the values in each int32 lane (8 values of 4 bits, 4 of 8
 *                               bits); the portable level: in each block
 * By tokens (many tokens, AVX-512): a lane is a token, and four numbers of a row of weights meet 16 tokens at once.
 *   values  int8  [M / 16, width / 4, 16 tokens, 4]
 *   scale   float [M / 16, blocks, 16 tokens]
 *   start   int32 [M / 16, blocks, 16 tokens]   as above, in each block
 */
#ifndef CIERZO_QUANTIZED_ROWS_H
#define CIERZO_QUANTIZED_ROWS_H

#include "quantized_matmul.h"

#define SMALLEST 0x1p-119f

enum {
    LANES = 16,       /* tokens side by side */
    MOST_FEW = 8,     /* tokens that one pass by rows takes with AVX-512 */
    SPAN = 256,       /* numbers that are rounded together: whole blocks of every size */
    ROOM = 16,        /* scales past the last that a vector may read */
};

typedef struct Rows {
    int8_t *values;
    float *scale;
    int32_t *start;
    int64_t M, width, blocks, starts; /* sizes in the table above; by tokens, M is rounded up */
    int by_tokens;
    size_t bytes;
} Rows;

/* Where everything lies for M rows, in memory that begins at `memory` (NULL when only the bytes are asked for). */
Rows rows_in(const void *memory, int64_t M, const QuantizedWeight *);

/* Whether the layout by tokens is the faster one: measured, 8-bit weights need no unpacking. */
static inline int by_tokens_pays(int64_t M, const QuantizedWeight *w) {
    if (w->layout != LAYOUT_BY_NUMBER) return w->layout == LAYOUT_BY_TOKENS;
    return M > (w->bits == 4 ? MOST_FEW : 5);
}

/* log2 of the zero that stands where none is given. */
static inline int zero_shift(const QuantizedWeight *w) { return w->bits == 4 ? 3 : 7; }

/* Bytes of a row of weights, of scales, of zeros. */
static inline int64_t packed_stride(const QuantizedWeight *w) { return w->blocks * w->block * w->bits / 8; }
static inline int64_t zero_stride(const QuantizedWeight *w) { return (w->blocks * w->bits + 7) / 8; }

/* 127 / largest, or 0 for a block that counts as zero; *scale gets largest / 127. */
static inline float inverse_of_largest(float largest, float *scale) {
    const int tiny = largest < SMALLEST;
    *scale = tiny ? 0.0f : largest / 127.0f;
    return tiny ? 0.0f : 127.0f / largest;
}

/* Rounds `count` numbers (the rest of the block counts as zero) to `block` values; returns their scale. */
float round_block_portable(const float *x, int64_t count, int block, int8_t *values);
float round_block_avx2(const float *x, int64_t count, int block, int8_t *values);
float round_block_avx512(const float *x, int64_t count, int block, int8_t *values);

/* Puts a span of `width` values in order into the layout, from column k on; `values` may be read up to SPAN. */
void place_portable(const Rows *, const QuantizedWeight *, int64_t m, int64_t k, int64_t width, const int8_t *values);
void place_avx2(const Rows *, const QuantizedWeight *, int64_t m, int64_t k, int64_t width, const int8_t *values);
void place_avx512(const Rows *, const QuantizedWeight *, int64_t m, int64_t k, int64_t width, const int8_t *values);
/* Rounds all numbers of 16 tokens, whose rows begin at x[0] ... x[15], by tokens. */
void round_tokens_avx512(const Rows *, const QuantizedWeight *, int64_t group, const float *const *x);

/* Columns [begin, end) of y, by rows. */
void multiply_rows_portable(const Rows *, const QuantizedWeight *, int64_t begin, int64_t end, float *y,
                            int64_t y_stride);
void multiply_rows_avx2(const Rows *, const QuantizedWeight *, int64_t begin, int64_t end, float *y,
                        int64_t y_stride);
void multiply_rows_avx512(const Rows *, const QuantizedWeight *, int64_t begin, int64_t end, float *y,
                          int64_t y_stride);

/* Columns [begin, end) of rows [first, last) of y, by tokens; first is a multiple of 16, last - first at most
 * MOST_TOKENS. */
enum { MOST_TOKENS = 256, ROWS_AT_ONCE = 48 };
void multiply_tokens_avx512(const Rows *, const QuantizedWeight *, int64_t begin, int64_t end, int64_t first,
                            int64_t last, float *y, int64_t y_stride);

#endif
