/* The loops of float_matmul.h with AVX-512. */
#include "float_matmul_isa.h"

#if defined(CIERZO_X86)
#include <immintrin.h>

CIERZO_BEGIN_AVX512

enum { LANES = 16, ROWS = 12, SPAN = 2, FEW_SUMS = 16 };
typedef float Vector __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));

static inline Vector half_vector(const uint16_t *from) {
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

static inline float sum_lanes(Vector v) { return _mm512_reduce_add_ps((__m512)v); }

static inline void transpose(const float *const *source, int64_t offset, float *target, int64_t stride) {
    __m512 a[16], b[16];
    UNROLL
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(source[i] + offset);
    /* First squares of 4 by 4 within each quarter of the vectors, then the quarters. */
    UNROLL
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
        a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
        a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
        a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    }
    UNROLL
    for (int j = 0; j < 4; j++) { /* a[4 * i + j] holds columns j, j + 4, j + 8, j + 12 of rows 4 * i ... 4 * i + 3 */
        b[j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
        b[4 + j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
        b[8 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        b[12 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
        _mm512_storeu_ps(target + j * stride, _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88));
        _mm512_storeu_ps(target + (8 + j) * stride, _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd));
        _mm512_storeu_ps(target + (4 + j) * stride, _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0x88));
        _mm512_storeu_ps(target + (12 + j) * stride, _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0xdd));
    }
}

#include "float_matmul_kernel.h"

CIERZO_END_ISA

const FloatKernels float_kernels_avx512 = {few, pack, panels, unpack};
#endif
