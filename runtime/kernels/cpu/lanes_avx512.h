/* Sums within and transposes across the lanes of 16 vectors, for files whose functions may use AVX-512. */
#include <immintrin.h>

#include "unroll.h"

/* The larger of two numbers without a sign, by their bits: a NaN is larger than all others. */
static inline __attribute__((always_inline)) __m512 larger(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

static inline __attribute__((always_inline)) __m512 joined(__m512 a, __m512 b, const int by_larger) {
    return by_larger ? larger(a, b) : _mm512_add_ps(a, b);
}

/* Lane i of the result is what the lanes of vector i give together; vectors from `count` (4, 8 or 16) on are zero. */
static inline __attribute__((always_inline)) __m512 lanes_joined(const __m512 *v, const int count,
                                                                 const int by_larger) {
    __m512 quarter[4]; /* quarter j, 128-bit lane i: what is left of vector 4 j + i */
    UNROLL for (int j = 0; j < 4; j++) {
        quarter[j] = _mm512_setzero_ps();
        if (4 * j >= count) continue;
        __m512 pair[2];
        UNROLL for (int i = 0; i < 2; i++) {
            __m512 a = v[4 * j + 2 * i], b = v[4 * j + 2 * i + 1];
            pair[i] = joined(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd), by_larger);
        }
        quarter[j] = joined(_mm512_shuffle_f32x4(pair[0], pair[1], 0x88), _mm512_shuffle_f32x4(pair[0], pair[1], 0xdd),
                            by_larger);
    }
    __m512 half[2];
    UNROLL for (int i = 0; i < 2; i++) {
        __m512 a = quarter[2 * i], b = quarter[2 * i + 1];
        half[i] = joined(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b), by_larger);
    }
    __m512d a = _mm512_castps_pd(half[0]), b = _mm512_castps_pd(half[1]);
    __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), high = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    __m512 all = joined(low, high, by_larger);
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_ps(order, all);
}

static inline __attribute__((always_inline)) __m512 sums_of_lanes(const __m512 *v, const int count) {
    return lanes_joined(v, count, 0);
}

/* Of 16 vectors without signs. */
static inline __attribute__((always_inline)) __m512 largest_of_lanes(const __m512 *v) { return lanes_joined(v, 16, 1); }

/* Lane j of vector i and lane i of vector j change places. */
static inline __attribute__((always_inline)) void transpose_16x16(__m512i *v) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* v[4 g + c] holds in its 128-bit lane l the lanes 4 g ... 4 g + 3 of the column 4 l + c. */
    UNROLL for (int c = 0; c < 4; c++) {
        __m512i a = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88), b = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
        __m512i d = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd), e = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
    UNROLL for (int i = 0; i < 16; i++) v[i] = t[i];
}
