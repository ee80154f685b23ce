/* Rounding a block of activations to 8 bits, and putting rounded values where a product looks for them. All levels give
 * the same values: see quantized_matmul.h for the rule. */
#include <string.h>

#include "isa.h"
#include "quantized_rows.h"

/* -- portable -- */

float round_block_portable(const float *x, int64_t count, int block, int8_t *values) {
    /* Without its sign a float orders as a whole number does, and a NaN stands above infinity. */
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    float largest, scale;
    memcpy(&largest, &most, sizeof largest);
    const float inverse = inverse_of_largest(largest, &scale);
    for (int64_t i = 0; i < count; i++) {
        /* At 1.5 * 2^23 the next float is one further: the sum is rounded as it should be, its low bits are q. */
        float sum = x[i] * inverse + 12582912.0f;
        uint32_t bits;
        memcpy(&bits, &sum, sizeof bits);
        values[i] = (int8_t)(uint8_t)(bits & 0xffu);
    }
    if (count < block) memset(values + count, 0, (size_t)(block - count));
    return scale;
}

void place_portable(const Rows *rows, const QuantizedWeight *w, int64_t m, int64_t k, int64_t width,
                    const int8_t *values) {
    memcpy(rows->values + m * rows->width + k, values, (size_t)width);
    int32_t *start = rows->start + m * rows->starts + k / w->block;
    for (int64_t at = 0; at < width && k + at < w->blocks * w->block; at += w->block) {
        int32_t sum = 0;
        for (int i = 0; i < w->block; i++) sum += values[at + i];
        *start++ = -sum * (1 << zero_shift(w));
    }
}

#if defined(CIERZO_X86)
#include <immintrin.h>

/* -- AVX2 -- */

CIERZO_BEGIN_AVX2
float round_block_avx2(const float *x, int64_t count, int block, int8_t *values) {
    float whole[SPAN];
    if (count < block) {
        memcpy(whole, x, (size_t)count * sizeof *x);
        memset(whole + count, 0, (size_t)(block - count) * sizeof *x);
        x = whole;
    }
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < block; i += 8) {
        __m256i bits = _mm256_loadu_si256((const __m256i *)(const void *)(x + i));
        most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
    }
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    float scale;
    const __m256 inverse = _mm256_set1_ps(inverse_of_largest(_mm_cvtss_f32(_mm_castsi128_ps(half)), &scale));
    for (int i = 0; i < block; i += 16) {
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), inverse));
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(void *)(values + i), bytes);
    }
    return scale;
}

static inline __m256i load_256(const int8_t *at) { return _mm256_loadu_si256((const __m256i *)(const void *)at); }

void place_avx2(const Rows *rows, const QuantizedWeight *w, int64_t m, int64_t k, int64_t width, const int8_t *values) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi16(255);
    const __m256i zero = _mm256_set1_epi8((char)(1 << zero_shift(w)));
    int8_t *to = rows->values + m * rows->width + k;
    int32_t *start = rows->start + m * rows->starts + k * w->bits / 32;
    if (w->bits == 8) memcpy(to, values, (size_t)width);
    for (int64_t i = 0; i < width; i += w->bits == 8 ? 32 : 64, start += 8) {
        __m256i sums;
        if (w->bits == 8) {
            sums = _mm256_maddubs_epi16(zero, load_256(values + i));
        } else {
            __m256i a = load_256(values + i), b = load_256(values + i + 32);
            __m256i even = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
            __m256i odd = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
            even = _mm256_permute4x64_epi64(even, 0xd8);
            odd = _mm256_permute4x64_epi64(odd, 0xd8);
            int8_t *half = to + i / 128 * 128 + i % 128 / 2;
            _mm256_storeu_si256((__m256i *)(void *)half, even);
            _mm256_storeu_si256((__m256i *)(void *)(half + 64), odd);
            sums = _mm256_add_epi16(_mm256_maddubs_epi16(zero, even), _mm256_maddubs_epi16(zero, odd));
        }
        sums = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_madd_epi16(sums, ones));
        _mm256_storeu_si256((__m256i *)(void *)start, sums);
    }
}
CIERZO_END_ISA
#endif
