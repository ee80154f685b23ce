/* e to the power of 16 numbers, for files whose functions may use AVX-512.
 *
 * exp(x) = 2^n * 2^f with n the nearest whole number to x / ln 2. ln 2 is taken off in two parts (Cody and Waite 1980),
 * and a polynomial of degree 6 (Taylor, |r| <= ln 2 / 2) is within 2 units in the last place. What overflows becomes
 * infinity, what underflows zero, a NaN stays one.
 */
#include <immintrin.h>

static inline __m512 exp_avx512(__m512 x) {
    const __m512 low = _mm512_set1_ps(-104.0f), high = _mm512_set1_ps(89.0f);
    /* The number itself is the second operand: max and min give that one back when it is a NaN. */
    x = _mm512_min_ps(high, _mm512_max_ps(low, x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}
