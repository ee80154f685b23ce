/* The product for many tokens with AVX-512: a lane is a token, and four numbers of a row of weights meet 16 tokens in
 * one instruction. Weights are unpacked once for up to MOST_TOKENS tokens, whose values stay in the cache. */
#include "isa.h"
#include "quantized_rows.h"

#if defined(CIERZO_X86)
#include <immintrin.h>
#include <string.h>

#include "unroll.h"

CIERZO_BEGIN_AVX512
#include "lanes_avx512.h"

enum {
    DEPTH = 2048,               /* numbers of K that are multiplied before the sums are put down */
    STRIDE = DEPTH + 64,        /* rows of unpacked weights that far apart do not fall on the same cache lines */
    HEIGHT = 12,                /* rows that are unpacked together */
    MOST_BLOCKS = DEPTH / 16,
    GROUPS = MOST_TOKENS / LANES,
};

typedef struct Unpacked {
    _Alignas(64) uint8_t values[HEIGHT * STRIDE];
    _Alignas(64) float scale[HEIGHT * MOST_BLOCKS];
    _Alignas(64) int32_t zero[HEIGHT * MOST_BLOCKS];
} Unpacked;

/* Columns [k, k + width) of row n, as whole numbers in order, with their scales and zeros. */
static void unpack_row(const QuantizedWeight *w, int64_t n, int64_t k, int64_t width, uint8_t *values, float *scale,
                       int32_t *zero) {
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t *packed = w->packed + n * packed_stride(w) + k * w->bits / 8;
    const int64_t ahead = HEIGHT * packed_stride(w); /* the row that is unpacked into the same place next */
    if (w->bits == 4) {
        for (int64_t i = 0; i < width; i += 64) {
            int64_t bytes = (width - i) / 2;
            __mmask32 mask = bytes >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << bytes) - 1;
            __m512i v = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, packed + i / 2));
            if (i % 128 == 0) _mm_prefetch((const char *)packed + i / 2 + ahead, _MM_HINT_T1);
            v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi16(v, 4)), low);
            _mm512_store_si512(values + i, v);
        }
    } else {
        for (int64_t i = 0; i < width; i += 64) {
            __mmask64 mask = width - i >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (width - i)) - 1;
            _mm_prefetch((const char *)packed + i + ahead, _MM_HINT_T1);
            _mm512_store_si512(values + i, _mm512_maskz_loadu_epi8(mask, packed + i));
        }
    }
    const int64_t first = k / w->block, blocks = width / w->block, at = n * w->blocks + first;
    for (int64_t b = 0; b < blocks; b += LANES) {
        int64_t rest = blocks - b;
        __mmask16 mask = rest >= LANES ? (__mmask16)0xffff : (__mmask16)((1 << rest) - 1);
        __m512 scales = w->scale_is_half
                            ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)w->scale + at + b))
                            : _mm512_maskz_loadu_ps(mask, (const float *)w->scale + at + b);
        _mm512_store_ps(scale + b, scales);
        _mm_prefetch((const char *)w->scale + (at + b + HEIGHT * w->blocks) * (w->scale_is_half ? 2 : 4), _MM_HINT_T1);
        if (w->zero == NULL) continue;
        /* DEPTH holds an even number of blocks of every size, so that the first zero of a piece begins a byte. */
        const uint8_t *zeros = w->zero + n * zero_stride(w) + (first + b) * w->bits / 8;
        __m128i z;
        if (w->bits == 4) {
            __mmask16 bytes = rest >= LANES ? (__mmask16)0xff : (__mmask16)((1 << (rest + 1) / 2) - 1);
            __m128i pairs = _mm_cvtepu8_epi16(_mm_maskz_loadu_epi8(bytes, zeros));
            z = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
        } else {
            z = _mm_maskz_loadu_epi8(mask, zeros);
        }
        _mm512_store_si512(zero + b, _mm512_cvtepu8_epi32(z));
    }
}

/* Four values of a row for all lanes. */
static inline __attribute__((always_inline)) __m512i four(const uint8_t *values) {
    int32_t word;
    memcpy(&word, values, sizeof word);
    return _mm512_set1_epi32(word);
}

/* The sums of R rows and V groups of tokens over `width` numbers; sums of one group lie ROWS_AT_ONCE vectors apart. */
static inline __attribute__((always_inline)) void tile(const Rows *rows, const Unpacked *u, int block, int64_t group,
                                                       int64_t k, int64_t width, int from, float *sums, const int R,
                                                       const int V, const int given_zero, const int shift) {
    const int8_t *x = rows->values + (group * rows->width + k) * LANES;
    const int64_t x_step = rows->width * LANES, block_step = rows->blocks * LANES;
    const float *x_scale = rows->scale + (group * rows->blocks + k / block) * LANES;
    const int32_t *start = rows->start + (group * rows->blocks + k / block) * LANES;
    const uint8_t *values = u->values + from * STRIDE;
    const float *scale = u->scale + from * MOST_BLOCKS;
    const int32_t *zero = u->zero + from * MOST_BLOCKS;
    __m512 sum[12];
    UNROLL for (int i = 0; i < R * V; i++)
        sum[i] = k == 0 ? _mm512_setzero_ps() : _mm512_load_ps(sums + ((i % V) * ROWS_AT_ONCE + i / V) * LANES);
    for (int64_t done = 0; done < width; done += block) {
        __m512i dot[12], begin[2];
        UNROLL for (int v = 0; v < V; v++) begin[v] = _mm512_loadu_si512(start + v * block_step);
        UNROLL for (int i = 0; i < R * V; i++) {
            dot[i] = begin[i % V];
            if (given_zero) {
                const __m512i minus_sum = _mm512_srai_epi32(begin[i % V], (unsigned)shift);
                const __m512i z = _mm512_set1_epi32(zero[(i / V) * MOST_BLOCKS]);
                dot[i] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), minus_sum, z);
            }
        }
        for (int j = 0; j < block; j += 16) {
            UNROLL for (int q = 0; q < 4; q++) {
                __m512i x4[2];
                UNROLL for (int v = 0; v < V; v++) x4[v] = _mm512_loadu_si512(x + v * x_step + q * 64);
                UNROLL for (int r = 0; r < R; r++) {
                    const __m512i w4 = four(values + r * STRIDE + q * 4);
                    UNROLL for (int v = 0; v < V; v++) dot[r * V + v] = _mm512_dpbusd_epi32(dot[r * V + v], w4, x4[v]);
                }
            }
            x += 256;
            values += 16;
        }
        __m512 scale_v[2];
        UNROLL for (int v = 0; v < V; v++) scale_v[v] = _mm512_loadu_ps(x_scale + v * block_step);
        UNROLL for (int i = 0; i < R * V; i++) {
            const __m512 both = _mm512_mul_ps(scale_v[i % V], _mm512_set1_ps(scale[(i / V) * MOST_BLOCKS]));
            sum[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[i]), both, sum[i]);
        }
        x_scale += LANES;
        start += LANES;
        scale++;
        zero++;
    }
    UNROLL for (int i = 0; i < R * V; i++) _mm512_store_ps(sums + ((i % V) * ROWS_AT_ONCE + i / V) * LANES, sum[i]);
}

/* Unpacked rows times all groups of tokens, two groups at a time. */
#define ROW_TILE(NAME, GIVEN_ZERO)                                                                                    \
    static void NAME(const Rows *rows, const Unpacked *u, const QuantizedWeight *w, int64_t first, int64_t last,      \
                     int64_t k, int64_t width, float *sums) {                                                         \
        const int shift = zero_shift(w);                                                                              \
        int64_t group = first;                                                                                        \
        for (; group + 2 <= last; group += 2, sums += 2 * ROWS_AT_ONCE * LANES)                                       \
            for (int from = 0; from < HEIGHT; from += 6)                                                              \
                tile(rows, u, w->block, group, k, width, from, sums + from * LANES, 6, 2, GIVEN_ZERO, shift);         \
        if (group < last) tile(rows, u, w->block, group, k, width, 0, sums, 12, 1, GIVEN_ZERO, shift);                \
    }
ROW_TILE(row_tile_default, 0)
ROW_TILE(row_tile_zeros, 1)

/* The sums [groups, ROWS_AT_ONCE, 16 tokens] to rows [first, last) of y, columns [n, end). */
static void put_down(const float *sums, int64_t n, int64_t end, int64_t first, int64_t last, float *y,
                     int64_t y_stride) {
    for (int64_t m = first; m < last; m += LANES, sums += ROWS_AT_ONCE * LANES)
        for (int64_t at = 0; n + at < end; at += LANES) {
            __m512i v[LANES];
            UNROLL for (int i = 0; i < LANES; i++) v[i] = _mm512_load_si512(sums + (at + i) * LANES);
            transpose_16x16(v);
            __mmask16 mask = end - n - at >= LANES ? (__mmask16)0xffff : (__mmask16)((1 << (end - n - at)) - 1);
            float *to = y + m * y_stride + n + at;
            UNROLL for (int i = 0; i < LANES; i++)
                if (m + i < last) _mm512_mask_storeu_ps(to + i * y_stride, mask, _mm512_castsi512_ps(v[i]));
        }
}

void multiply_tokens_avx512(const Rows *rows, const QuantizedWeight *w, int64_t begin, int64_t end, int64_t first,
                            int64_t last, float *y, int64_t y_stride) {
    Unpacked u;
    _Alignas(64) float sums[GROUPS * ROWS_AT_ONCE * LANES];
    const int64_t first_group = first / LANES, last_group = (last + LANES - 1) / LANES;
    for (int64_t n = begin; n < end; n += ROWS_AT_ONCE) {
        const int64_t stop = end - n < ROWS_AT_ONCE ? end : n + ROWS_AT_ONCE;
        for (int64_t k = 0; k < rows->width; k += DEPTH) {
            const int64_t width = rows->width - k < DEPTH ? rows->width - k : DEPTH;
            for (int64_t from = 0; n + from < stop; from += HEIGHT) {
                for (int r = 0; r < HEIGHT; r++) {
                    const int64_t row = n + from + r, there = row < stop ? row : stop - 1; /* again, and not stored */
                    unpack_row(w, there, k, width, u.values + r * STRIDE, u.scale + r * MOST_BLOCKS,
                               u.zero + r * MOST_BLOCKS);
                }
                (w->zero == NULL ? row_tile_default : row_tile_zeros)(rows, &u, w, first_group, last_group, k, width,
                                                                      sums + from * LANES);
            }
        }
        put_down(sums, n, stop, first, last, y, y_stride);
    }
}
CIERZO_END_ISA
#endif
