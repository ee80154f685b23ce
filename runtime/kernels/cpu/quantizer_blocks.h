/* One group of blocks, one block a lane: included by a file for each instruction level, which defines before
 *
 * LANES, Lane (LANES floats), Word (LANES 32-bit integers) and, with the prefix lane_, the operations used below.
 * See quantizer.h for the methods, and for why nothing here may be contracted or reordered.
 */
#include "quantizer.h"

#include <string.h>

/* 1.5 * 2^23: in a sum with it a number of magnitude below 2^22 loses its fraction, ties to even. */
#define ROUNDER 12582912.0f
#define ROUNDER_BITS 0x4B400000

enum { CANDIDATES = 10 }; /* a multiple of 2 */

/* Each candidate's steps between zero and the largest weight (between both ends, with zero points), less those that are
 * there. More steps than there are clip the largest weights and are finer for all others. Half a step apart is where
 * the error stops falling (benchmarks/results/quantization.md). */
#define FIRST_SYMMETRIC -1.5f
#define FIRST_ASYMMETRIC -2.5f
#define APART 0.5f

/* The block's numbers run from `low` to `high`, both whole: q - zero. */
typedef struct Range {
    Lane low, high;
} Range;

/* The best so far: what the scale explains of the sum of squares, the scale, the zero point. */
typedef struct Best {
    Lane explained, scale, zero;
} Best;

static inline Lane nearest_whole(Lane value, Range range) {
    Lane rounder = lane_set(ROUNDER);
    Lane inside = lane_max(lane_min(value, range.high), range.low);
    return lane_sub(lane_add(inside, rounder), rounder);
}

/* With numbers q the least-squares scale is <x,q> / <q,q>, which explains <x,q>^2 / <q,q> of <x,x>. */
static inline void consider(Best *best, Lane xq, Lane qq, Lane zero) {
    Lane scale = lane_div(xq, qq), explained = lane_mul(xq, scale);
    Lane old = best->explained; /* without numbers but 0 both are NaN, and not greater */
    best->explained = lane_where_greater(explained, old, explained, old);
    best->scale = lane_where_greater(explained, old, scale, best->scale);
    best->zero = lane_where_greater(explained, old, zero, best->zero);
}

/* Two candidates at once, which hides how long an addition takes. */
static void try_two(const Quantizer *job, const float *x, const Lane inverse[2], const Range range[2], const Lane zero[2],
                    Best *best) {
    Lane xq0 = lane_set(0), qq0 = lane_set(0), xq1 = lane_set(0), qq1 = lane_set(0);
    for (int k = 0; k < job->block; k++) {
        Lane weight = lane_load(x + k * LANES);
        Lane q0 = nearest_whole(lane_mul(weight, inverse[0]), range[0]);
        Lane q1 = nearest_whole(lane_mul(weight, inverse[1]), range[1]);
        xq0 = lane_add(xq0, lane_mul(weight, q0));
        xq1 = lane_add(xq1, lane_mul(weight, q1));
        qq0 = lane_add(qq0, lane_mul(q0, q0));
        qq1 = lane_add(qq1, lane_mul(q1, q1));
    }
    consider(best, xq0, qq0, zero[0]);
    consider(best, xq1, qq1, zero[1]);
}

static inline void refine(const Quantizer *job, const float *x, Range whole, Best *best) {
    Lane xq = lane_set(0), qq = lane_set(0);
    Lane inverse = lane_where_zero(best->scale, lane_set(0), lane_div(lane_set(1), best->scale));
    Range range = {lane_sub(whole.low, best->zero), lane_sub(whole.high, best->zero)};
    for (int k = 0; k < job->block; k++) {
        Lane weight = lane_load(x + k * LANES);
        Lane q = nearest_whole(lane_mul(weight, inverse), range);
        xq = lane_add(xq, lane_mul(weight, q));
        qq = lane_add(qq, lane_mul(q, q));
    }
    consider(best, xq, qq, best->zero);
}

/* The squared error of the final numbers: those nearest to weight / scale. */
static Lane squared_error(const Quantizer *job, const float *x, Lane scale, Lane divisor, Range range) {
    Lane error = lane_set(0);
    for (int k = 0; k < job->block; k++) {
        Lane weight = lane_load(x + k * LANES);
        Lane missed = lane_sub(weight, lane_mul(scale, nearest_whole(lane_div(weight, divisor), range)));
        error = lane_add(error, lane_mul(missed, missed));
    }
    return error;
}

static void load_group(const Quantizer *job, QuantizerGroup *group) {
    if (group->lanes < LANES) memset(group->x, 0, sizeof(float) * (size_t)(job->block * LANES));
    for (int lane = 0; lane < group->lanes; lane++) {
        const uint16_t *from = group->from[lane];
        int count = group->count[lane];
        if (job->type == FROM_FLOAT)
            for (int k = 0; k < count; k++) group->x[k * LANES + lane] = ((const float *)group->from[lane])[k];
        else if (job->type == FROM_BFLOAT16)
            for (int k = 0; k < count; k++) {
                uint32_t bits = (uint32_t)from[k] << 16;
                memcpy(&group->x[k * LANES + lane], &bits, sizeof bits);
            }
        else
            for (int k = 0; k < count; k++) group->x[k * LANES + lane] = float_of_half(from[k]);
        for (int k = count; k < job->block; k++) group->x[k * LANES + lane] = 0;
    }
}

static inline Lane stored_scale(const Quantizer *job, Lane scale) { return job->half_scales ? lane_half(scale) : scale; }

static int quantize_group(const Quantizer *job, QuantizerGroup *group) {
    float *x = group->x;
    load_group(job, group);
    Lane zero = lane_set(0), low = zero, high = zero, extreme = zero;
    for (int k = 0; k < job->block; k++) {
        Lane weight = lane_load(x + k * LANES);
        low = lane_min(weight, low);
        high = lane_max(weight, high);
        extreme = lane_where_greater(lane_abs(weight), lane_abs(extreme), weight, extreme);
        zero = lane_add(zero, lane_sub(weight, weight)); /* NaN from the first that is infinite or NaN */
    }
    if (lane_any_nan(zero)) return QUANTIZER_NOT_FINITE;

    /* A power of two next to the largest magnitude is taken out, so that no square overflows or vanishes. */
    Lane up, down;
    lane_power_of_two(lane_abs(extreme), &up, &down);
    for (int k = 0; k < job->block; k++) lane_store(x + k * LANES, lane_mul(lane_load(x + k * LANES), down));
    low = lane_mul(low, down), high = lane_mul(high, down), extreme = lane_mul(extreme, down);

    const float half = (float)(1 << (job->bits - 1)), top = 2 * half - 1;
    Range whole = {lane_set(job->zero_points ? 0 : -half), lane_set(job->zero_points ? top : half - 1)};
    Lane width = lane_sub(high, low), one = lane_set(1);
    Lane span = job->zero_points ? width : lane_sub(zero, extreme);
    Lane divisor = lane_where_zero(span, one, span);
    Lane steps = lane_set(job->zero_points ? top : half);
    Lane nearest = lane_mul(stored_scale(job, lane_mul(lane_div(span, steps), up)), down);
    Lane nearest_divisor = lane_where_zero(nearest, one, nearest), nearest_zero = zero;
    if (job->zero_points) {
        Lane zero_point = nearest_whole(lane_div(lane_sub(zero, low), nearest_divisor), whole);
        nearest_zero = lane_where_zero(nearest, zero, zero_point);
    }
    Lane scale = nearest, point = nearest_zero;

    if (job->search) {
        Best best = {zero, zero, zero};
        for (int candidate = 0; candidate < CANDIDATES; candidate += 2) {
            Lane inverse[2], points[2] = {zero, zero};
            Range range[2] = {whole, whole};
            for (int i = 0; i < 2; i++) {
                float more = (job->zero_points ? FIRST_ASYMMETRIC : FIRST_SYMMETRIC) + APART * (float)(candidate + i);
                inverse[i] = lane_div(lane_add(steps, lane_set(more)), divisor);
                if (!job->zero_points) continue;
                /* What is clipped is clipped from both ends alike. */
                Lane place = lane_sub(lane_mul(lane_sub(zero, low), inverse[i]), lane_set(more * 0.5f));
                points[i] = nearest_whole(place, whole);
                range[i].low = lane_sub(whole.low, points[i]), range[i].high = lane_sub(whole.high, points[i]);
            }
            try_two(job, x, inverse, range, points, &best);
        }
        refine(job, x, whole, &best);
        refine(job, x, whole, &best);
        Lane found = lane_mul(stored_scale(job, lane_mul(best.scale, up)), down);
        Lane found_divisor = lane_where_zero(found, one, found);
        Range found_range = {lane_sub(whole.low, best.zero), lane_sub(whole.high, best.zero)};
        Range nearest_range = {lane_sub(whole.low, nearest_zero), lane_sub(whole.high, nearest_zero)};
        Lane found_error = squared_error(job, x, found, found_divisor, found_range);
        Lane nearest_error = squared_error(job, x, nearest, nearest_divisor, nearest_range);
        scale = lane_where_greater(found_error, nearest_error, nearest, found);
        point = lane_where_greater(found_error, nearest_error, nearest_zero, best.zero);
    }

    divisor = lane_where_zero(scale, one, scale);
    Range range = {lane_sub(whole.low, point), lane_sub(whole.high, point)};
    Lane shift = job->zero_points ? point : lane_set(half);
    lane_store(group->scale, lane_mul(scale, up));
    word_store((uint32_t *)group->zero, word_of(lane_add(shift, lane_set(ROUNDER)), ROUNDER_BITS));
    const int in_word = 32 / job->bits;
    for (int begin = 0, word = 0; begin < job->block; begin += in_word, word++) {
        Word packed = word_set(0);
        for (int i = in_word - 1; i >= 0; i--) {
            Lane weight = lane_load(x + (begin + i) * LANES);
            Lane q = nearest_whole(lane_div(weight, divisor), range);
            q = lane_where_zero(scale, zero, q);
            Word number = word_of(lane_add(lane_add(q, shift), lane_set(ROUNDER)), ROUNDER_BITS);
            packed = job->bits == 4 ? word_append(packed, 4, number) : word_append(packed, 8, number);
        }
        word_store(group->words + word * LANES, packed);
    }
    return 0;
}
