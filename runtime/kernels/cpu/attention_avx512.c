/* Attention's inner loops on vectors of 16 numbers. */
#include "isa.h"

#if defined(CIERZO_X86)
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "attention.h"

CIERZO_BEGIN_AVX512
#include "exp_avx512.h"
#include "lanes_avx512.h"

typedef __m512 Vec;
enum { VEC = 16, TILE = 6, TILE_VECS = 4 };

static inline Vec zero(void) { return _mm512_setzero_ps(); }
static inline Vec spread(float x) { return _mm512_set1_ps(x); }
static inline Vec load(const float *x) { return _mm512_loadu_ps(x); }
static inline void store(float *y, Vec x) { _mm512_storeu_ps(y, x); }
static inline Vec add(Vec x, Vec y) { return _mm512_add_ps(x, y); }
static inline Vec sub(Vec x, Vec y) { return _mm512_sub_ps(x, y); }
static inline Vec mul(Vec x, Vec y) { return _mm512_mul_ps(x, y); }
static inline Vec quotient(Vec x, Vec y) { return _mm512_div_ps(x, y); }
static inline Vec max_of(Vec x, Vec y) { return _mm512_max_ps(x, y); }
static inline Vec absolute(Vec x) { return _mm512_abs_ps(x); }
static inline Vec madd(Vec x, Vec y, Vec z) { return _mm512_fmadd_ps(x, y, z); }
static inline Vec exp_of(Vec x) { return exp_avx512(x); }
static inline float greatest_of(Vec x) { return _mm512_reduce_max_ps(x); }
static inline float sum_of(Vec x) { return _mm512_reduce_add_ps(x); }

static inline Vec keep_between(Vec x, Vec j, Vec from, Vec to) {
    __mmask16 seen = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(j, from, _CMP_GE_OQ), j, to, _CMP_LT_OQ);
    return _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), x);
}

static inline __attribute__((always_inline)) Vec widened(RingKind kind, const void *x, int64_t i) {
    if (kind == RING_FLOAT) return _mm512_loadu_ps((const float *)x + i);
    if (kind == RING_HALF) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)x + i)));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)((const int8_t *)x + i))));
}

static inline __attribute__((always_inline)) Vec widened_tail(RingKind kind, const void *x, int64_t i, int64_t n) {
    const __mmask16 there = (__mmask16)((1u << n) - 1);
    if (kind == RING_FLOAT) return _mm512_maskz_loadu_ps(there, (const float *)x + i);
    if (kind == RING_HALF) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, (const uint16_t *)x + i));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, (const int8_t *)x + i)));
}

static inline void store_half(uint16_t *y, Vec x) {
    _mm256_storeu_si256((__m256i *)y, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline void store_int8(int8_t *y, Vec x) {
    _mm_storeu_si128((__m128i *)y, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

static inline Vec sums_of(const Vec *x) { return sums_of_lanes(x, VEC); }

static inline void transpose_square(const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    __m512i square[VEC];
    for (int i = 0; i < VEC; i++) square[i] = _mm512_loadu_si512(x + i * x_stride);
    transpose_16x16(square);
    for (int i = 0; i < VEC; i++) _mm512_storeu_si512(y + i * y_stride, square[i]);
}

#include "attention_loops.h"
CIERZO_END_ISA

const AttentionLoops attention_loops_avx512 = ATTENTION_LOOPS;
#endif
