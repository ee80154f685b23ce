/* Rounding activations to 8 bits with AVX-512: see quantized_matmul.h for the rule. */
#include "isa.h"
#include "quantized_rows.h"

#if defined(CIERZO_X86)
#include <immintrin.h>

#include "unroll.h"

CIERZO_BEGIN_AVX512
#include "lanes_avx512.h"

static inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? (__mmask16)0xffff : count > 0 ? (__mmask16)((1 << count) - 1) : 0;
}

float round_block_avx512(const float *x, int64_t count, int block, int8_t *values) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < block; i += 16) {
        const __mmask16 mask = first_lanes(count - i);
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_maskz_loadu_epi32(mask, x + i), magnitude));
    }
    __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    __m128i quarter = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    quarter = _mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
    quarter = _mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1));
    float scale;
    const __m512 inverse = _mm512_set1_ps(inverse_of_largest(_mm_cvtss_f32(_mm_castsi128_ps(quarter)), &scale));
    for (int i = 0; i < block; i += 16) {
        const __mmask16 mask = first_lanes(count - i);
        __m512i numbers = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
        _mm_storeu_si128((__m128i *)(void *)(values + i), _mm512_cvtepi32_epi8(numbers));
    }
    return scale;
}

/* The low bytes of 64 pairs of bytes. */
static inline __attribute__((always_inline)) __m512i low_bytes(__m512i a, __m512i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
}

void place_avx512(const Rows *rows, const QuantizedWeight *w, int64_t m, int64_t k, int64_t width,
                  const int8_t *values) {
    const __m512i zero = _mm512_set1_epi8((char)(1 << zero_shift(w))), none = _mm512_setzero_si512();
    int8_t *to = rows->values + m * rows->width + k;
    int32_t *start = rows->start + m * rows->starts + k * w->bits / 32;
    for (int64_t i = 0; i < width; i += 512 / w->bits, start += LANES) {
        __m512i a = _mm512_loadu_si512(values + i), sums;
        if (w->bits == 8) {
            _mm512_storeu_si512(to + i, a);
            sums = _mm512_dpbusd_epi32(none, zero, a);
        } else {
            __m512i b = _mm512_loadu_si512(values + i + 64);
            __m512i even = low_bytes(a, b), odd = low_bytes(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
            _mm512_storeu_si512(to + i, even);
            _mm512_storeu_si512(to + i + 64, odd);
            sums = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, zero, even), zero, odd);
        }
        _mm512_storeu_si512(start, _mm512_sub_epi32(none, sums));
    }
}

/* Rounds a block of 16 tokens: values [16, SPAN], scales of the tokens side by side. */
static inline __attribute__((always_inline)) void round_block_of_tokens(const float *const *x, int64_t k, int64_t count,
                                                                        int block, int8_t *values, float *scale) {
    const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
    __m512 most[LANES];
    UNROLL for (int t = 0; t < LANES; t++) most[t] = _mm512_setzero_ps();
    for (int i = 0; i < block; i += 16) {
        const __mmask16 mask = first_lanes(count - i);
        UNROLL for (int t = 0; t < LANES; t++)
            most[t] = larger(most[t], _mm512_and_ps(_mm512_maskz_loadu_ps(mask, x[t] + k + i), magnitude));
    }
    const __m512 largest = largest_of_lanes(most);
    /* A NaN is not less than SMALLEST, and stays one. */
    const __mmask16 counts = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(SMALLEST), _CMP_NLT_UQ);
    _mm512_storeu_ps(scale, _mm512_maskz_div_ps(counts, largest, _mm512_set1_ps(127.0f)));
    _Alignas(64) float inverse[LANES];
    _mm512_store_ps(inverse, _mm512_maskz_div_ps(counts, _mm512_set1_ps(127.0f), largest));
    for (int i = 0; i < block; i += 16) {
        const __mmask16 mask = first_lanes(count - i);
        UNROLL for (int t = 0; t < LANES; t++) {
            const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x[t] + k + i), _mm512_set1_ps(inverse[t]));
            __m128i *to = (__m128i *)(void *)(values + t * SPAN + i);
            _mm_store_si128(to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled)));
            _mm_prefetch((const char *)(x[t] + k + i + SPAN), _MM_HINT_T0);
        }
    }
}

/* Puts a span of 16 tokens, values [16, SPAN], where the product looks for it. */
static void place_tokens(const Rows *rows, const QuantizedWeight *w, int64_t group, int64_t k, int64_t width,
                         const int8_t *values) {
    const __m512i zero = _mm512_set1_epi8((char)(1 << zero_shift(w))), none = _mm512_setzero_si512();
    int8_t *to = rows->values + (group * rows->width + k) * LANES;
    for (int64_t i = 0; i < width; i += 64) {
        __m512i v[LANES];
        UNROLL for (int t = 0; t < LANES; t++) v[t] = _mm512_loadu_si512(values + t * SPAN + i);
        transpose_16x16(v);
        UNROLL for (int j = 0; j < LANES; j++)
            if (i + 4 * j < width) _mm512_storeu_si512(to + (i + 4 * j) * LANES, v[j]);
    }
    int32_t *start = rows->start + (group * rows->blocks + k / w->block) * LANES;
    for (int64_t at = 0; at < width; at += w->block, start += LANES) {
        __m512i sum = none;
        for (int i = 0; i < w->block; i += 4)
            sum = _mm512_dpbusd_epi32(sum, zero, _mm512_loadu_si512(to + (at + i) * LANES));
        _mm512_storeu_si512(start, _mm512_sub_epi32(none, sum));
    }
}

void round_tokens_avx512(const Rows *rows, const QuantizedWeight *w, int64_t group, const float *const *x) {
    _Alignas(64) int8_t values[LANES * SPAN];
    float *scale = rows->scale + group * rows->blocks * LANES;
    for (int64_t k = 0; k < rows->width; k += SPAN) {
        const int64_t width = rows->width - k < SPAN ? rows->width - k : SPAN;
        for (int64_t at = 0; at < width; at += w->block, scale += LANES)
            round_block_of_tokens(x, k + at, w->K - k - at, w->block, values + at, scale);
        place_tokens(rows, w, group, k, width, values);
    }
}
CIERZO_END_ISA
#endif
