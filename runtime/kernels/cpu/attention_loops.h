/* The inner loops of attention, compiled once for every instruction level: included by attention_<level>.c after its
 * vectors, of which it has to define
 *
 *   Vec, VEC            a vector of VEC float32, VEC a divisor of WIDEST and a multiple of FEW_ROWS
 *   TILE, TILE_VECS     keys (or columns) and vectors of queries of which the sums are held in registers
 *   zero, spread, load, store, add, sub, mul, quotient, max_of, absolute, madd (x * y + z), exp_of
 *   greatest_of, sum_of              over the elements of one vector
 *   keep_between(x, j, from, to)     x where from <= j < to, minus infinity elsewhere
 *   widened, widened_tail            VEC numbers of a ring as float32; the first n < VEC, then zeros
 *   sums_of(x)                       element i is the sum of the elements of x[i], i < VEC
 *   transpose_square                 VEC x VEC numbers
 *   store_half, store_int8           rounded to nearest, ties to even
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "attention.h"
#include "unroll.h"

#define INLINE static inline __attribute__((always_inline))

#include "attention_few.h"
#include "attention_many.h"

INLINE void widen_of(const RingKind kind, const char *x, const float *scale, int64_t count, int64_t D, float *y) {
    for (int64_t row = 0; row < count; row++, x += D * (int64_t)ring_element(kind), y += D) {
        Vec s = spread(scale == NULL ? 1.0f : scale[row]);
        int64_t d = 0;
        for (; d + VEC <= D; d += VEC) store(y + d, mul(s, widened(kind, x, d)));
        if (d < D) store(y + d, mul(s, widened_tail(kind, x, d, D - d)));
    }
}

static void widen(RingKind kind, const void *x, const float *scale, int64_t count, int64_t D, float *y) {
    if (kind == RING_HALF) widen_of(RING_HALF, x, NULL, count, D, y);
    else if (kind == RING_INT8) widen_of(RING_INT8, x, scale, count, D, y);
    else memcpy(y, x, (size_t)(count * D) * sizeof *y);
}

static void transpose(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *y, int64_t y_stride) {
    for (int64_t r = 0; r < rows; r += VEC)
        for (int64_t c = 0; c < columns; c += VEC) {
            const float *from = x + r * x_stride + c;
            float *to = y + c * y_stride + r;
            if (r + VEC <= rows && c + VEC <= columns) {
                transpose_square(from, x_stride, to, y_stride);
                continue;
            }
            for (int64_t i = 0; i < VEC && r + i < rows; i++)
                for (int64_t k = 0; k < VEC && c + k < columns; k++) to[k * y_stride + i] = from[i * x_stride + k];
        }
}

static void to_half(const float *x, uint16_t *y, int64_t count) {
    int64_t i = 0;
    for (; i + VEC <= count; i += VEC) store_half(y + i, load(x + i));
    if (i == count) return;
    float rest[VEC] = {0};
    uint16_t rounded[VEC];
    memcpy(rest, x + i, (size_t)(count - i) * sizeof *x);
    store_half(rounded, load(rest));
    memcpy(y + i, rounded, (size_t)(count - i) * sizeof *y);
}

static float to_int8(const float *x, int8_t *y, int64_t count) {
    const int64_t whole = count / VEC * VEC;
    float rest[VEC] = {0};
    int8_t rounded[VEC];
    memcpy(rest, x + whole, (size_t)(count - whole) * sizeof *x);
    Vec most = absolute(load(rest));
    for (int64_t i = 0; i < whole; i += VEC) most = max_of(most, absolute(load(x + i)));
    const float scale = greatest_of(most) / 127.0f;
    if (scale == 0.0f) {
        memset(y, 0, (size_t)count);
        return scale;
    }
    for (int64_t i = 0; i < whole; i += VEC) store_int8(y + i, quotient(load(x + i), spread(scale)));
    store_int8(rounded, quotient(load(rest), spread(scale)));
    memcpy(y + whole, rounded, (size_t)(count - whole));
    return scale;
}

#define ATTENTION_LOOPS {attend_few, attend_many, widen, transpose, to_half, to_int8}
