/* Quantisation of 8 blocks at a time. */
#include "isa.h"
#include "quantizer.h"

#if defined(CIERZO_X86)
#include <immintrin.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
CIERZO_BEGIN_AVX2

#define LANES 8
typedef __m256 Lane;
typedef __m256i Word;

static inline Lane lane_set(float value) { return _mm256_set1_ps(value); }
static inline Lane lane_load(const float *from) { return _mm256_loadu_ps(from); }
static inline void lane_store(float *to, Lane value) { _mm256_storeu_ps(to, value); }
static inline Lane lane_add(Lane a, Lane b) { return _mm256_add_ps(a, b); }
static inline Lane lane_sub(Lane a, Lane b) { return _mm256_sub_ps(a, b); }
static inline Lane lane_mul(Lane a, Lane b) { return _mm256_mul_ps(a, b); }
static inline Lane lane_div(Lane a, Lane b) { return _mm256_div_ps(a, b); }
static inline Lane lane_min(Lane a, Lane b) { return _mm256_min_ps(a, b); }
static inline Lane lane_max(Lane a, Lane b) { return _mm256_max_ps(a, b); }
static inline Lane lane_abs(Lane a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline Lane lane_where_greater(Lane a, Lane b, Lane yes, Lane no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
static inline Lane lane_where_zero(Lane a, Lane yes, Lane no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_EQ_OQ));
}
static inline int lane_any_nan(Lane a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
static inline Lane lane_half(Lane a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
static inline Word word_set(uint32_t value) { return _mm256_set1_epi32((int)value); }
static inline void word_store(uint32_t *to, Word value) { _mm256_storeu_si256((__m256i *)to, value); }
static inline Word word_append(Word low_after, int bits, Word number) {
    return _mm256_or_si256(_mm256_sll_epi32(low_after, _mm_cvtsi32_si128(bits)), number);
}
static inline Word word_of(Lane value, int32_t base) {
    return _mm256_sub_epi32(_mm256_castps_si256(value), _mm256_set1_epi32(base));
}
static inline void lane_power_of_two(Lane magnitude, Lane *up, Lane *down) {
    Word bits = _mm256_and_si256(_mm256_castps_si256(magnitude), _mm256_set1_epi32(0x7F800000));
    bits = _mm256_max_epi32(bits, _mm256_set1_epi32(0x00800000));
    bits = _mm256_min_epi32(bits, _mm256_set1_epi32(0x7E800000)); /* its inverse would be subnormal otherwise */
    *up = _mm256_castsi256_ps(bits);
    *down = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(0x7F000000), bits));
}

#include "quantizer_blocks.h"

int quantize_group_avx2(const Quantizer *job, QuantizerGroup *group) { return quantize_group(job, group); }

CIERZO_END_ISA
#else
int quantize_group_avx2(const Quantizer *job, QuantizerGroup *group) { return quantize_group_portable(job, group); }
#endif
