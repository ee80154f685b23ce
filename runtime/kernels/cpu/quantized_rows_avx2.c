/* The product with AVX2, for any number of tokens: as quantized_rows_avx512.c, with half as wide a vector. */
#include "isa.h"
#include "quantized_rows.h"

#if defined(CIERZO_X86)
#include <immintrin.h>
#include <string.h>

#include "unroll.h"

CIERZO_BEGIN_AVX2

enum { LANES_256 = 8, TOKENS = 4 };

/* How the 32 bytes of a step share out into blocks: see quantized_rows_avx512.c. */
typedef struct Step {
    int64_t count, rest, blocks_of_a_step;
    int shift;
    __m256i lane_block;
} Step;

static Step step_of(const QuantizedWeight *w) {
    Step s = {0};
    int64_t numbers = 256 / w->bits, row = packed_stride(w);
    s.count = (row + 31) / 32;
    s.rest = row - (s.count - 1) * 32;
    s.blocks_of_a_step = numbers > w->block ? numbers / w->block : 1;
    for (int64_t n = numbers; n > w->block; n /= 2) s.shift++;
    for (int64_t n = w->block; n > numbers; n /= 2) s.shift--;
    int32_t lanes[LANES_256];
    for (int i = 0; i < LANES_256; i++) lanes[i] = (int32_t)(i * (32 / w->bits) / w->block);
    s.lane_block = _mm256_loadu_si256((const __m256i *)(const void *)lanes);
    return s;
}

static inline __attribute__((always_inline)) __m256i load_256(const void *at) {
    return _mm256_loadu_si256((const __m256i *)at);
}

/* Up to four scales of row n from block `first` on, each in its lanes. */
static inline __attribute__((always_inline)) __m256 weight_scales(const QuantizedWeight *w, int64_t n, int64_t first,
                                                                  __m256i lane_block) {
    const int64_t at = n * w->blocks + first, left = w->blocks - first;
    __m128 scales;
    if (w->scale_is_half) {
        uint64_t halves = 0;
        const uint16_t *from = (const uint16_t *)w->scale + at;
        memcpy(&halves, from, left >= 4 ? 8 : (size_t)left * 2);
        scales = _mm_cvtph_ps(_mm_cvtsi64_si128((long long)halves));
    } else {
        float four[4] = {0};
        const float *from = (const float *)w->scale + at;
        memcpy(four, from, left >= 4 ? sizeof four : (size_t)left * 4);
        scales = _mm_loadu_ps(four);
    }
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(scales), lane_block);
}

/* The zeros of up to four blocks, likewise. */
static inline __attribute__((always_inline)) __m256i weight_zeros(const QuantizedWeight *w, const int bits, int64_t n,
                                                                  int64_t first, __m256i lane_block) {
    const int64_t bit = first * bits, left = zero_stride(w) - bit / 8;
    uint32_t word = 0;
    memcpy(&word, w->zero + n * zero_stride(w) + bit / 8, left >= 4 ? 4 : (size_t)left);
    __m256i shifts = _mm256_slli_epi32(lane_block, bits == 4 ? 2 : 3);
    __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32((int32_t)(word >> (bit & 7))), shifts);
    return _mm256_and_si256(shifted, _mm256_set1_epi32((1 << bits) - 1));
}

static float sum_of_lanes(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

/* R columns of y from column n on (those from `end` on repeat the last) for T tokens from token m on. */
static inline __attribute__((always_inline)) void tile(const Rows *rows, const QuantizedWeight *w, const Step *step,
                                                       int64_t n, int64_t end, int64_t m, float *y, int64_t y_stride,
                                                       const int R, const int T, const int bits, const int given_zero) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), lane_block = step->lane_block;
    const __m256i sixteens = _mm256_set1_epi16(16);
    const int64_t stride = packed_stride(w);
    int64_t row[4];
    __m256 sum[8];
    for (int r = 0; r < R; r++) row[r] = n + r < end ? n + r : end - 1;
    UNROLL for (int i = 0; i < R * T; i++) sum[i] = _mm256_setzero_ps();
    for (int64_t c = 0; c < step->count; c++) {
        const int64_t first = step->shift >= 0 ? c << step->shift : c >> -step->shift;
        /* 4 bits: halves of 64 bytes. 8 bits: a number is split too, since 255 * 127 * 2 overflows 16 bits. */
        const int64_t at = bits == 4 ? (c >> 1) * 128 + (c & 1) * 32 : c * 32;
        __m256i lower[4], upper[4], zero[4];
        __m256 scale[4];
        UNROLL for (int r = 0; r < R; r++) {
            const uint8_t *packed = w->packed + row[r] * stride + c * 32;
            __m256i v;
            if (c + 1 < step->count || step->rest == 32) {
                v = load_256(packed);
                _mm_prefetch((const char *)(packed + R * stride), _MM_HINT_T0);
            } else {
                uint8_t whole[32] = {0};
                memcpy(whole, packed, (size_t)step->rest);
                v = load_256(whole);
            }
            lower[r] = _mm256_and_si256(v, low);
            upper[r] = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
            scale[r] = weight_scales(w, row[r], first, lane_block);
            zero[r] = given_zero ? weight_zeros(w, bits, row[r], first, lane_block) : v;
        }
        UNROLL for (int t = 0; t < T; t++) {
            const int8_t *values = rows->values + (m + t) * rows->width + at;
            const __m256i x_lower = load_256(values), x_upper = bits == 4 ? load_256(values + 64) : x_lower;
            const __m256i start = load_256(rows->start + (m + t) * rows->starts + c * LANES_256);
            const __m256i minus_sum = _mm256_srai_epi32(start, bits == 4 ? 3 : 7);
            const __m256 some = _mm256_castps128_ps256(_mm_loadu_ps(rows->scale + (m + t) * rows->blocks + first));
            const __m256 x_scale = _mm256_permutevar8x32_ps(some, lane_block);
            UNROLL for (int r = 0; r < R; r++) {
                __m256i a = _mm256_maddubs_epi16(lower[r], x_lower), b = _mm256_maddubs_epi16(upper[r], x_upper);
                __m256i dot = bits == 4 ? _mm256_madd_epi16(_mm256_add_epi16(a, b), ones)
                                        : _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, sixteens));
                dot = _mm256_add_epi32(dot, given_zero ? _mm256_madd_epi16(minus_sum, zero[r]) : start);
                const __m256 both = _mm256_mul_ps(scale[r], x_scale);
                sum[r * T + t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), both, sum[r * T + t]);
            }
        }
    }
    UNROLL for (int i = 0; i < R * T; i++) y[(m + i % T) * y_stride + row[i / T]] = sum_of_lanes(sum[i]);
}

#define COLUMNS(R, T)                                                                                                 \
    static void columns_of_##T(const Rows *rows, const QuantizedWeight *w, const Step *step, int64_t n,               \
                               int64_t end, int64_t m, float *y, int64_t y_stride) {                                  \
        if (w->bits == 4 && w->zero == NULL) tile(rows, w, step, n, end, m, y, y_stride, R, T, 4, 0);                 \
        else if (w->bits == 4) tile(rows, w, step, n, end, m, y, y_stride, R, T, 4, 1);                               \
        else if (w->zero == NULL) tile(rows, w, step, n, end, m, y, y_stride, R, T, 8, 0);                            \
        else tile(rows, w, step, n, end, m, y, y_stride, R, T, 8, 1);                                                 \
    }
COLUMNS(2, 1)
COLUMNS(2, 2)
COLUMNS(2, 3)
COLUMNS(2, 4)

void multiply_rows_avx2(const Rows *rows, const QuantizedWeight *w, int64_t begin, int64_t end, float *y,
                        int64_t y_stride) {
    const Step step = step_of(w);
    for (int64_t n = begin; n < end; n += 2)
        for (int64_t m = 0; m < rows->M; m += TOKENS) {
            int64_t tokens = rows->M - m;
            if (tokens >= 4) columns_of_4(rows, w, &step, n, end, m, y, y_stride);
            else if (tokens == 3) columns_of_3(rows, w, &step, n, end, m, y, y_stride);
            else if (tokens == 2) columns_of_2(rows, w, &step, n, end, m, y, y_stride);
            else columns_of_1(rows, w, &step, n, end, m, y, y_stride);
        }
}
CIERZO_END_ISA
#endif
