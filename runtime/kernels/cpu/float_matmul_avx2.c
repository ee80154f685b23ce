/* The loops of float_matmul.h with AVX2, FMA and F16C. */
#include "float_matmul_isa.h"

#if defined(CIERZO_X86)
#include <immintrin.h>

CIERZO_BEGIN_AVX2

enum { LANES = 8, ROWS = 6, SPAN = 1, FEW_SUMS = 8 };
typedef float Vector __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));

static inline Vector half_vector(const uint16_t *from) {
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}

static inline float sum_lanes(Vector v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static inline void transpose_8(const float *const *source, int64_t offset, float *target, int64_t stride) {
    __m256 a[8], b[8];
    UNROLL
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(source[i] + offset);
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
        _mm256_storeu_ps(target + j * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
        _mm256_storeu_ps(target + (4 + j) * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
    }
}

static inline void transpose(const float *const *source, int64_t offset, float *target, int64_t stride) {
    transpose_8(source, offset, target, stride);
    transpose_8(source, offset + 8, target + 8 * stride, stride);
    transpose_8(source + 8, offset, target + 8, stride);
    transpose_8(source + 8, offset + 8, target + 8 * stride + 8, stride);
}

#include "float_matmul_kernel.h"

CIERZO_END_ISA

const FloatKernels float_kernels_avx2 = {few, pack, panels, unpack};
#endif
