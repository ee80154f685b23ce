/* Quantisation in plain C, a block at a time. */
#include "quantizer.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <math.h>

#define LANES 1
typedef float Lane;
typedef uint32_t Word;

static inline Lane lane_set(float value) { return value; }
static inline Lane lane_load(const float *from) { return *from; }
static inline void lane_store(float *to, Lane value) { *to = value; }
static inline Lane lane_add(Lane a, Lane b) { return a + b; }
static inline Lane lane_sub(Lane a, Lane b) { return a - b; }
static inline Lane lane_mul(Lane a, Lane b) { return a * b; }
static inline Lane lane_div(Lane a, Lane b) { return a / b; }
static inline Lane lane_min(Lane a, Lane b) { return a < b ? a : b; }
static inline Lane lane_max(Lane a, Lane b) { return a > b ? a : b; }
static inline Lane lane_abs(Lane a) { return fabsf(a); }
static inline Lane lane_where_greater(Lane a, Lane b, Lane yes, Lane no) { return a > b ? yes : no; }
static inline Lane lane_where_zero(Lane a, Lane yes, Lane no) { return a == 0 ? yes : no; }
static inline int lane_any_nan(Lane a) { return a != a; }
static inline Lane lane_half(Lane a) { return float_of_half(half_of_float(a)); }
static inline Word word_set(uint32_t value) { return value; }
static inline void word_store(uint32_t *to, Word value) { *to = value; }
static inline Word word_append(Word low_after, int bits, Word number) { return low_after << bits | number; }

static inline Word word_of(Lane value, int32_t base) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits - (uint32_t)base;
}

static inline void lane_power_of_two(Lane magnitude, Lane *up, Lane *down) {
    uint32_t bits, inverse;
    __builtin_memcpy(&bits, &magnitude, sizeof bits);
    bits &= 0x7F800000u;
    if (bits < 0x00800000u) bits = 0x00800000u;
    if (bits > 0x7E800000u) bits = 0x7E800000u; /* its inverse would be subnormal otherwise */
    inverse = 0x7F000000u - bits;
    __builtin_memcpy(up, &bits, sizeof bits);
    __builtin_memcpy(down, &inverse, sizeof inverse);
}

#include "quantizer_blocks.h"

int quantize_group_portable(const Quantizer *job, QuantizerGroup *group) { return quantize_group(job, group); }
