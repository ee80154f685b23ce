/* Attention's inner loops on vectors of 4 numbers, which every compiler has for every machine (SSE2, NEON). */
#include <float.h>
#include <math.h>
#include <string.h>

#include "attention.h"

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
enum { VEC = 4, TILE = 4, TILE_VECS = 2 };

static inline Vec spread(float x) { return (Vec){x, x, x, x}; }
static inline Vec zero(void) { return spread(0.0f); }
static inline Vec load(const float *x) { Vec y; memcpy(&y, x, sizeof y); return y; }
static inline void store(float *y, Vec x) { memcpy(y, &x, sizeof x); }
static inline Vec add(Vec x, Vec y) { return x + y; }
static inline Vec sub(Vec x, Vec y) { return x - y; }
static inline Vec mul(Vec x, Vec y) { return x * y; }
static inline Vec quotient(Vec x, Vec y) { return x / y; }
static inline Vec madd(Vec x, Vec y, Vec z) { return x * y + z; }
static inline Vec chosen(IntVec mask, Vec x, Vec y) { return (Vec)((mask & (IntVec)x) | (~mask & (IntVec)y)); }
static inline Vec max_of(Vec x, Vec y) { return chosen(x > y, x, y); }
static inline Vec absolute(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }
static inline float sum_of(Vec x) { return (x[0] + x[1]) + (x[2] + x[3]); }
static inline Vec keep_between(Vec x, Vec j, Vec from, Vec to) { return chosen((j >= from) & (j < to), x, spread(-INFINITY)); }

static inline float greatest_of(Vec x) {
    float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
}

/* As exp_avx2.h, for x <= 0: what underflows is zero from 2^-126 on. */
static inline Vec exp_of(Vec x) {
    const Vec low = spread(-87.3f), magic = spread(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    IntVec tiny = x < low;
    Vec shifted = chosen(tiny, low, x) * 1.44269504f + magic, n = shifted - magic;
    Vec r = chosen(tiny, low, x) - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec p = spread(1.0f / 720) * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    IntVec exponent = ((IntVec)shifted - (IntVec)magic + 127) << 23;
    return chosen(tiny, zero(), p * (Vec)exponent);
}

static inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    float y;
    if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13; /* infinity, not a number */
    else if (rest >= 0x400) bits = (rest << 13) + (112u << 23);
    else { /* below 2^-14: a whole number of 2^-24 */
        y = (float)rest * 0x1p-24f;
        memcpy(&bits, &y, sizeof y);
    }
    bits |= sign;
    memcpy(&y, &bits, sizeof y);
    return y;
}

static inline uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof x);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00; /* from 65520 on */
    if (bits >= 0x38800000) return sign | (uint16_t)((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
    return sign | (uint16_t)lrintf(fabsf(x) * 0x1p24f);
}

static inline __attribute__((always_inline)) Vec widened(RingKind kind, const void *x, int64_t i) {
    if (kind == RING_FLOAT) return load((const float *)x + i);
    if (kind == RING_HALF) {
        const uint16_t *h = (const uint16_t *)x + i;
        return (Vec){half_to_float(h[0]), half_to_float(h[1]), half_to_float(h[2]), half_to_float(h[3])};
    }
    const int8_t *b = (const int8_t *)x + i;
    return (Vec){(float)b[0], (float)b[1], (float)b[2], (float)b[3]};
}

static inline Vec widened_tail(RingKind kind, const void *x, int64_t i, int64_t n) {
    const size_t bytes = ring_element(kind);
    float copy[VEC] = {0};
    memcpy(copy, (const char *)x + (size_t)i * bytes, (size_t)n * bytes);
    return widened(kind, copy, 0);
}

static inline void store_half(uint16_t *y, Vec x) {
    for (int i = 0; i < VEC; i++) y[i] = float_to_half(x[i]);
}

static inline void store_int8(int8_t *y, Vec x) {
    for (int i = 0; i < VEC; i++) {
        float kept = x[i] < 127.0f ? x[i] : 127.0f; /* not a number becomes one too */
        y[i] = (int8_t)lrintf(kept > -128.0f ? kept : -128.0f);
    }
}

static inline Vec sums_of(const Vec *x) { return (Vec){sum_of(x[0]), sum_of(x[1]), sum_of(x[2]), sum_of(x[3])}; }

static inline void transpose_square(const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    for (int i = 0; i < VEC; i++)
        for (int k = 0; k < VEC; k++) y[k * y_stride + i] = x[i * x_stride + k];
}

#include "attention_loops.h"

const AttentionLoops attention_loops_portable = ATTENTION_LOOPS;
