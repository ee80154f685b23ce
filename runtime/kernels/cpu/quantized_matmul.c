#include "quantized_matmul.h"

#include <string.h>

#include "isa.h"
#include "quantized_rows.h"

static int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

const char *quantized_weight_fault(const QuantizedWeight *w) {
    if (w->bits != 4 && w->bits != 8) return "quantised weights have 4 or 8 bits";
    if (w->block < 16 || w->block > SPAN || (w->block & (w->block - 1)) != 0)
        return "a block of quantised weights is a power of two from 16 to 256";
    if (w->N < 0 || w->K < 1 || w->blocks != (w->K + w->block - 1) / w->block)
        return "a quantised matrix needs at least one column of input and a block for each piece of it";
    return NULL;
}

Rows rows_in(const void *memory, int64_t M, const QuantizedWeight *w) {
    Rows rows = {.by_tokens = isa_level() == ISA_AVX512 && by_tokens_pays(M, w)};
    if (rows.by_tokens) {
        rows.M = up_to(M, LANES);
        rows.width = w->blocks * w->block;
        rows.blocks = rows.starts = w->blocks;
    } else {
        rows.M = M;
        rows.width = up_to(w->blocks * w->block, 128);
        rows.blocks = w->blocks + ROOM;
        rows.starts = rows.width * w->bits / 32;
    }
    int8_t *base = (int8_t *)(uintptr_t)memory;
    size_t scale_at = (size_t)up_to(rows.M * rows.width, 64);
    size_t start_at = (size_t)up_to((int64_t)scale_at + rows.M * rows.blocks * 4, 64);
    rows.bytes = start_at + (size_t)(rows.M * rows.starts) * 4;
    if (base != NULL) {
        rows.values = base;
        rows.scale = (float *)(void *)(base + scale_at);
        rows.start = (int32_t *)(void *)(base + start_at);
    }
    return rows;
}

size_t quantized_rows_bytes(int64_t M, const QuantizedWeight *w) { return rows_in(NULL, M, w).bytes; }

/* -- rounding -- */

/* Rows that one call rounds: about ten microseconds' worth. */
static int64_t rows_at_once(int64_t M, const QuantizedWeight *w) {
    if (rows_in(NULL, M, w).by_tokens) return LANES;
    return most(1, 32768 / w->K);
}

size_t quantize_pieces(int64_t M, const QuantizedWeight *w) {
    int64_t each = rows_at_once(M, w);
    return (size_t)((M + each - 1) / each);
}

typedef float (*RoundBlock)(const float *, int64_t, int, int8_t *);
typedef void (*Place)(const Rows *, const QuantizedWeight *, int64_t, int64_t, int64_t, const int8_t *);

void quantize_rows(const float *x, int64_t stride, const int64_t *index, int64_t M, const QuantizedWeight *w,
                   void *memory, size_t piece) {
    const Rows rows = rows_in(memory, M, w);
    const int64_t each = rows_at_once(M, w), first = (int64_t)piece * each, last = least(M, first + each);
    const int64_t whole = w->blocks * w->block;
    RoundBlock round_block = round_block_portable;
    Place place = place_portable;
#if defined(CIERZO_X86)
    if (isa_level() == ISA_AVX512) round_block = round_block_avx512, place = place_avx512;
    else if (isa_level() == ISA_AVX2) round_block = round_block_avx2, place = place_avx2;
    if (rows.by_tokens) {
        const float *token[LANES]; /* the last one once more where there are none left, and never looked at */
        for (int64_t t = 0, m; t < LANES; t++) {
            m = least(first + t, M - 1);
            token[t] = x + (index == NULL ? m : index[m]) * stride;
        }
        round_tokens_avx512(&rows, w, (int64_t)piece, token);
        return;
    }
#endif
    for (int64_t m = first; m < last; m++) {
        _Alignas(64) int8_t values[SPAN] = {0};
        const float *token = x + (index == NULL ? m : index[m]) * stride;
        float *scale = rows.scale + m * rows.blocks;
        for (int64_t k = 0; k < whole; k += SPAN) {
            int64_t width = least(SPAN, whole - k);
            for (int64_t at = 0; at < width; at += w->block)
                *scale++ = round_block(token + k + at, least(w->block, w->K - k - at), w->block, values + at);
            /* What is left of the last vector counts as zero. */
            if (width < SPAN) memset(values + width, 0, (size_t)(SPAN - width));
            place(&rows, w, m, k, least(SPAN, rows.width - k), values);
        }
        memset(scale, 0, ROOM * sizeof *scale);
    }
}

/* -- the product -- */

/* Columns of y that one call computes: by rows 64 KiB of weights for each eight tokens, by tokens whole groups. */
static int64_t columns_at_once(int64_t M, const QuantizedWeight *w) {
    if (rows_in(NULL, M, w).by_tokens) return M <= 64 ? 2 * ROWS_AT_ONCE : ROWS_AT_ONCE;
    int64_t bytes = 65536 / ((M + MOST_FEW - 1) / MOST_FEW);
    return most(4, bytes / packed_stride(w) / 4 * 4);
}

static int64_t token_pieces(int64_t M, const QuantizedWeight *w) {
    return rows_in(NULL, M, w).by_tokens ? (M + MOST_TOKENS - 1) / MOST_TOKENS : 1;
}

size_t multiply_pieces(int64_t M, const QuantizedWeight *w) {
    int64_t each = columns_at_once(M, w);
    return M == 0 ? 0 : (size_t)((w->N + each - 1) / each * token_pieces(M, w));
}

void multiply_rows(const void *memory, int64_t M, const QuantizedWeight *w, float *y, int64_t y_stride, size_t piece) {
    const Rows rows = rows_in(memory, M, w);
    const int64_t each = columns_at_once(M, w), across = (w->N + each - 1) / each;
    const int64_t begin = (int64_t)piece % across * each, end = least(w->N, begin + each);
#if defined(CIERZO_X86)
    if (rows.by_tokens) {
        /* Pieces of the same tokens follow each other, so that these stay in the second-level cache. */
        int64_t first = (int64_t)piece / across * MOST_TOKENS;
        multiply_tokens_avx512(&rows, w, begin, end, first, least(M, first + MOST_TOKENS), y, y_stride);
    } else if (isa_level() == ISA_AVX512) {
        multiply_rows_avx512(&rows, w, begin, end, y, y_stride);
    } else if (isa_level() == ISA_AVX2) {
        multiply_rows_avx2(&rows, w, begin, end, y, y_stride);
    } else
#endif
        multiply_rows_portable(&rows, w, begin, end, y, y_stride);
}
