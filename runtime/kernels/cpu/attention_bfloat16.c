/* Prefill with products of bfloat16: twice as many numbers in a vector, and sums in float32.
 *
 * Queries, keys, weights and values are rounded to bfloat16, to nearest. Numbers lie in pairs, whose two products one
 * instruction adds to a sum: two neighbours of a head's vector in queries and keys, two keys in weights and values.
 * Scores are logarithms to base 2, as exponents are; the logarithm's factor is part of the query.
 */
#include "attention.h"
#include "isa.h"

#if defined(CIERZO_X86) && (defined(__clang__) || __GNUC__ >= 10) /* older GCC does not know these instructions */
#include <immintrin.h>
#include <math.h>

#include "unroll.h"

CIERZO_BEGIN_AVX512_BF16
#define INLINE static inline __attribute__((always_inline))

enum { VEC = 16, TILE = 6, VECS = LANES / VEC };

/* (a, b) of 16 lanes as bfloat16, one pair to a lane. */
INLINE __m512i paired(__m512 a, __m512 b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

INLINE __m512 add_products(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* Up to 16 numbers of a slot from number d on, float32, without its scale. */
INLINE __m512 widened(const RingKind kind, const char *slot, int64_t d, __mmask16 there) {
    if (kind == RING_FLOAT) return _mm512_maskz_loadu_ps(there, (const float *)(const void *)slot + d);
    if (kind == RING_HALF)
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, (const uint16_t *)(const void *)slot + d));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, (const int8_t *)slot + d)));
}

INLINE __m512 scaled(const RingKind kind, __m512 x, const float *scale, int64_t slot) {
    return kind == RING_INT8 ? _mm512_mul_ps(x, _mm512_set1_ps(scale[slot])) : x;
}

INLINE __mmask16 first_of(int64_t count) { return count >= VEC ? 0xffff : (__mmask16)((1u << count) - 1); }

INLINE void round_keys(const RingKind kind, const Slots *slots, int64_t D, uint32_t *key) {
    const char *x = slots->key;
    for (int64_t i = 0; i < slots->count; i++, x += D * (int64_t)ring_element(kind), key += D / 2)
        for (int64_t d = 0; d < D; d += 2 * VEC) {
            __m512 low = scaled(kind, widened(kind, x, d, first_of(D - d)), slots->key_scale, i);
            __m512 high = _mm512_setzero_ps();
            if (d + VEC < D) high = scaled(kind, widened(kind, x, d + VEC, first_of(D - d - VEC)), slots->key_scale, i);
            _mm512_mask_storeu_epi32(key + d / 2, first_of((D - d) / 2), (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
}

/* An odd number of values gets one of zeros as the last one's other half. */
INLINE void round_values(const RingKind kind, const Slots *slots, int64_t D, uint32_t *value) {
    const int64_t bytes = D * (int64_t)ring_element(kind);
    const char *x = slots->value;
    for (int64_t i = 0; i < slots->count; i += 2, x += 2 * bytes, value += D)
        for (int64_t d = 0; d < D; d += VEC) {
            const __mmask16 there = first_of(D - d);
            __m512 even = scaled(kind, widened(kind, x, d, there), slots->value_scale, i), odd = _mm512_setzero_ps();
            if (i + 1 < slots->count) odd = scaled(kind, widened(kind, x + bytes, d, there), slots->value_scale, i + 1);
            _mm512_mask_storeu_epi32(value + d, there, paired(even, odd));
        }
}

static void round_slots(const Slots *slots, int64_t D, uint32_t *key, uint32_t *value) {
    switch (slots->kind) {
    case RING_FLOAT: round_keys(RING_FLOAT, slots, D, key), round_values(RING_FLOAT, slots, D, value); break;
    case RING_HALF: round_keys(RING_HALF, slots, D, key), round_values(RING_HALF, slots, D, value); break;
    default: round_keys(RING_INT8, slots, D, key), round_values(RING_INT8, slots, D, value); break;
    }
}

/* In place: a pair takes the room of one number. */
static void round_queries(float *query, int64_t D) {
    const __m512 to_base_2 = _mm512_set1_ps(1.44269504f);
    for (int64_t d = 0; d < D; d += 2)
        for (int64_t lane = 0; lane < LANES; lane += VEC) {
            __m512 even = _mm512_mul_ps(_mm512_load_ps(query + d * LANES + lane), to_base_2);
            __m512 odd = _mm512_mul_ps(_mm512_load_ps(query + (d + 1) * LANES + lane), to_base_2);
            _mm512_store_si512(query + d / 2 * LANES + lane, paired(even, odd));
        }
}

/* score[i] = key[i] . query for `keys` keys */
INLINE void score_tile(const int keys, const uint32_t *key, const float *query, int64_t D, float *score) {
    __m512 sum[TILE][VECS];
    UNROLL for (int i = 0; i < keys; i++) UNROLL for (int v = 0; v < VECS; v++) sum[i][v] = _mm512_setzero_ps();
    for (int64_t d = 0; d < D / 2; d++) {
        __m512i q[VECS];
        UNROLL for (int v = 0; v < VECS; v++) q[v] = _mm512_load_si512(query + d * LANES + v * VEC);
        UNROLL for (int i = 0; i < keys; i++) {
            __m512i k = _mm512_set1_epi32((int)key[i * (D / 2) + d]);
            UNROLL for (int v = 0; v < VECS; v++) sum[i][v] = add_products(sum[i][v], k, q[v]);
        }
    }
    UNROLL for (int i = 0; i < keys; i++)
        UNROLL for (int v = 0; v < VECS; v++) _mm512_store_ps(score + i * LANES + v * VEC, sum[i][v]);
}

/* attended[i] = attended[i] * shrink + sum over pairs of weight[pair] * value[pair][i], for `columns` columns i. */
INLINE void weigh_tile(const int columns, const uint32_t *value, const float *weight, int64_t pairs, int64_t D,
                       const __m512 *shrink, float *attended) {
    __m512 sum[TILE][VECS];
    UNROLL for (int i = 0; i < columns; i++)
        UNROLL for (int v = 0; v < VECS; v++)
            sum[i][v] = _mm512_mul_ps(shrink[v], _mm512_load_ps(attended + i * LANES + v * VEC));
    for (int64_t j = 0; j < pairs; j++) {
        __m512i w[VECS];
        UNROLL for (int v = 0; v < VECS; v++) w[v] = _mm512_load_si512(weight + j * LANES + v * VEC);
        UNROLL for (int i = 0; i < columns; i++) {
            __m512i x = _mm512_set1_epi32((int)value[j * D + i]);
            UNROLL for (int v = 0; v < VECS; v++) sum[i][v] = add_products(sum[i][v], x, w[v]);
        }
    }
    UNROLL for (int i = 0; i < columns; i++)
        UNROLL for (int v = 0; v < VECS; v++) _mm512_store_ps(attended + i * LANES + v * VEC, sum[i][v]);
}

/* 2 to the power of x <= 0, for weights that are then rounded to 8 bits: 2^n by the exponent, the rest, at most half, by
 * Taylor's series up to the fifth power, which is within 3e-6 of it. A NaN stays one. */
INLINE __m512 power_of_2(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x); /* gives the second one back when it is a NaN */
    __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n), p = _mm512_set1_ps(1.33335581e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Hides what a lane does not see. */
static void hide(float *score, int64_t count, const float *from, const float *to) {
    for (int64_t j = 0; j < count; j++)
        for (int64_t lane = 0; lane < LANES; lane += VEC) {
            __m512 at = _mm512_set1_ps((float)j);
            __mmask16 seen = _mm512_cmp_ps_mask(at, _mm512_load_ps(from + lane), _CMP_GE_OQ);
            seen = _mm512_mask_cmp_ps_mask(seen, at, _mm512_load_ps(to + lane), _CMP_LT_OQ);
            __m512 x = _mm512_load_ps(score + j * LANES + lane);
            _mm512_store_ps(score + j * LANES + lane, _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), x));
        }
}

/* Scores become pairs of weights relative to the greatest score so far, in place. The total is that of the rounded
 * weights, so that what was attended stays a mean of values. */
static void soften(const ManyQueries *q, int64_t count, __m512 *shrink) {
    __m512 greatest[VECS], total[VECS];
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    UNROLL for (int v = 0; v < VECS; v++) greatest[v] = _mm512_load_ps(q->greatest + v * VEC);
    for (int64_t j = 0; j < count; j++)
        UNROLL for (int v = 0; v < VECS; v++)
            greatest[v] = _mm512_max_ps(greatest[v], _mm512_load_ps(q->score + j * LANES + v * VEC));
    UNROLL for (int v = 0; v < VECS; v++) {
        shrink[v] = power_of_2(_mm512_sub_ps(_mm512_load_ps(q->greatest + v * VEC), greatest[v]));
        total[v] = _mm512_mul_ps(_mm512_load_ps(q->total + v * VEC), shrink[v]);
    }
    for (int64_t j = 0; j < count; j += 2)
        UNROLL for (int v = 0; v < VECS; v++) {
            const float *score = q->score + j * LANES + v * VEC;
            __m512 even = power_of_2(_mm512_sub_ps(_mm512_load_ps(score), greatest[v])), odd = _mm512_setzero_ps();
            if (j + 1 < count) odd = power_of_2(_mm512_sub_ps(_mm512_load_ps(score + LANES), greatest[v]));
            __m512i weights = paired(even, odd);
            _mm512_store_si512(q->score + j / 2 * LANES + v * VEC, weights);
            total[v] = add_products(total[v], weights, ones);
        }
    UNROLL for (int v = 0; v < VECS; v++) {
        _mm512_store_ps(q->greatest + v * VEC, greatest[v]);
        _mm512_store_ps(q->total + v * VEC, total[v]);
    }
}

static void attend_many(const ManyQueries *q, const uint32_t *key, const uint32_t *value, int64_t count,
                        const float *from, const float *to) {
    const int64_t D = q->D, pairs = (count + 1) / 2;
    __m512 shrink[VECS];
    int64_t i = 0;
    for (; i + TILE <= count; i += TILE) score_tile(TILE, key + i * (D / 2), q->query, D, q->score + i * LANES);
    for (; i < count; i++) score_tile(1, key + i * (D / 2), q->query, D, q->score + i * LANES);
    if (from != NULL) hide(q->score, count, from, to);
    soften(q, count, shrink);
    for (i = 0; i + TILE <= D; i += TILE) weigh_tile(TILE, value + i, q->score, pairs, D, shrink, q->attended + i * LANES);
    for (; i + 2 <= D; i += 2) weigh_tile(2, value + i, q->score, pairs, D, shrink, q->attended + i * LANES);
}
CIERZO_END_ISA

static const RoundedLoops loops = {round_queries, round_slots, attend_many};

const RoundedLoops *rounded_loops(void) {
    return isa_level() >= ISA_AVX512 && __builtin_cpu_supports("avx512bf16") ? &loops : NULL;
}
#else
const RoundedLoops *rounded_loops(void) { return NULL; }
#endif
