/* Attention's inner loops on vectors of 8 numbers. */
#include "isa.h"

#if defined(CIERZO_X86)
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "attention.h"

CIERZO_BEGIN_AVX2
#include "exp_avx2.h"

typedef __m256 Vec;
enum { VEC = 8, TILE = 6, TILE_VECS = 2 };

static inline Vec zero(void) { return _mm256_setzero_ps(); }
static inline Vec spread(float x) { return _mm256_set1_ps(x); }
static inline Vec load(const float *x) { return _mm256_loadu_ps(x); }
static inline void store(float *y, Vec x) { _mm256_storeu_ps(y, x); }
static inline Vec add(Vec x, Vec y) { return _mm256_add_ps(x, y); }
static inline Vec sub(Vec x, Vec y) { return _mm256_sub_ps(x, y); }
static inline Vec mul(Vec x, Vec y) { return _mm256_mul_ps(x, y); }
static inline Vec quotient(Vec x, Vec y) { return _mm256_div_ps(x, y); }
static inline Vec max_of(Vec x, Vec y) { return _mm256_max_ps(x, y); }
static inline Vec absolute(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
static inline Vec madd(Vec x, Vec y, Vec z) { return _mm256_fmadd_ps(x, y, z); }
static inline Vec exp_of(Vec x) { return exp_avx2(x); }

static inline float greatest_of(Vec x) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

static inline float sum_of(Vec x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

static inline Vec keep_between(Vec x, Vec j, Vec from, Vec to) {
    Vec seen = _mm256_and_ps(_mm256_cmp_ps(j, from, _CMP_GE_OQ), _mm256_cmp_ps(j, to, _CMP_LT_OQ));
    return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, seen);
}

static inline __attribute__((always_inline)) Vec widened(RingKind kind, const void *x, int64_t i) {
    if (kind == RING_FLOAT) return _mm256_loadu_ps((const float *)x + i);
    if (kind == RING_HALF) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)x + i)));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)((const int8_t *)x + i))));
}

static inline Vec widened_tail(RingKind kind, const void *x, int64_t i, int64_t n) {
    const size_t bytes = ring_element(kind);
    float copy[VEC] = {0};
    memcpy(copy, (const char *)x + (size_t)i * bytes, (size_t)n * bytes);
    return widened(kind, copy, 0);
}

static inline void store_half(uint16_t *y, Vec x) {
    _mm_storeu_si128((__m128i *)y, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

static inline void store_int8(int8_t *y, Vec x) {
    __m256i rounded = _mm256_cvtps_epi32(x);
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storel_epi64((__m128i *)y, _mm_packs_epi16(half, half));
}

static inline Vec sums_of(const Vec *x) {
    Vec four = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    Vec more = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(four, more, 0x20), _mm256_permute2f128_ps(four, more, 0x31));
}

static inline void transpose_square(const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    Vec a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = load(x + i * x_stride);
    for (int i = 0; i < 8; i += 4) { /* 4 x 4 within each half */
        Vec p = _mm256_unpacklo_ps(a[i], a[i + 1]), q = _mm256_unpackhi_ps(a[i], a[i + 1]);
        Vec r = _mm256_unpacklo_ps(a[i + 2], a[i + 3]), s = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
        b[i] = _mm256_shuffle_ps(p, r, 0x44);
        b[i + 1] = _mm256_shuffle_ps(p, r, 0xee);
        b[i + 2] = _mm256_shuffle_ps(q, s, 0x44);
        b[i + 3] = _mm256_shuffle_ps(q, s, 0xee);
    }
    for (int i = 0; i < 4; i++) {
        store(y + i * y_stride, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
        store(y + (i + 4) * y_stride, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
    }
}

#include "attention_loops.h"
CIERZO_END_ISA

const AttentionLoops attention_loops_avx2 = ATTENTION_LOOPS;
#endif
