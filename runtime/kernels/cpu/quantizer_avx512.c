/* Quantisation of 16 blocks at a time. */
#include "isa.h"
#include "quantizer.h"

#if defined(CIERZO_X86)
#include <immintrin.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
CIERZO_BEGIN_AVX512

#define LANES 16
typedef __m512 Lane;
typedef __m512i Word;

static inline Lane lane_set(float value) { return _mm512_set1_ps(value); }
static inline Lane lane_load(const float *from) { return _mm512_loadu_ps(from); }
static inline void lane_store(float *to, Lane value) { _mm512_storeu_ps(to, value); }
static inline Lane lane_add(Lane a, Lane b) { return _mm512_add_ps(a, b); }
static inline Lane lane_sub(Lane a, Lane b) { return _mm512_sub_ps(a, b); }
static inline Lane lane_mul(Lane a, Lane b) { return _mm512_mul_ps(a, b); }
static inline Lane lane_div(Lane a, Lane b) { return _mm512_div_ps(a, b); }
static inline Lane lane_min(Lane a, Lane b) { return _mm512_min_ps(a, b); }
static inline Lane lane_max(Lane a, Lane b) { return _mm512_max_ps(a, b); }
static inline Lane lane_abs(Lane a) { return _mm512_abs_ps(a); }
static inline Lane lane_where_greater(Lane a, Lane b, Lane yes, Lane no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}
static inline Lane lane_where_zero(Lane a, Lane yes, Lane no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_EQ_OQ), no, yes);
}
static inline int lane_any_nan(Lane a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
static inline Lane lane_half(Lane a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
static inline Word word_set(uint32_t value) { return _mm512_set1_epi32((int)value); }
static inline void word_store(uint32_t *to, Word value) { _mm512_storeu_si512(to, value); }
static inline Word word_append(Word low_after, int bits, Word number) {
    return _mm512_or_si512(_mm512_sll_epi32(low_after, _mm_cvtsi32_si128(bits)), number);
}
static inline Word word_of(Lane value, int32_t base) {
    return _mm512_sub_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(base));
}
static inline void lane_power_of_two(Lane magnitude, Lane *up, Lane *down) {
    Word bits = _mm512_and_si512(_mm512_castps_si512(magnitude), _mm512_set1_epi32(0x7F800000));
    bits = _mm512_max_epi32(bits, _mm512_set1_epi32(0x00800000));
    bits = _mm512_min_epi32(bits, _mm512_set1_epi32(0x7E800000)); /* its inverse would be subnormal otherwise */
    *up = _mm512_castsi512_ps(bits);
    *down = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(0x7F000000), bits));
}

#include "quantizer_blocks.h"

int quantize_group_avx512(const Quantizer *job, QuantizerGroup *group) { return quantize_group(job, group); }

CIERZO_END_ISA
#else
int quantize_group_avx512(const Quantizer *job, QuantizerGroup *group) { return quantize_group_portable(job, group); }
#endif
