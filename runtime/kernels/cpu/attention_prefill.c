/* Prefill: blocks of queries against blocks of keys, in float32 whatever the rings hold, or in bfloat16. */
#include "attention.h"

#include <float.h>
#include <string.h>

static int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
static int64_t greater(int64_t x, int64_t y) { return x > y ? x : y; }

size_t block_floats(const Attention *a) {
    const int64_t wide = a->kind == RING_FLOAT ? 0 : 2 * (BLOCK * round_up(a->D, WIDEST) + WIDEST);
    const int64_t rounded = a->rounded == NULL ? 0 : ROUNDED_BLOCK * (LANES + a->D); /* a pair is as large as a float */
    return (size_t)(2 * a->D * LANES + 2 * LANES + greater(BLOCK * LANES + wide, rounded));
}

/* Queries of consecutive tokens: lane i is query first + i, head (first + i) % group of token (first + i) / group. */
typedef struct Lanes {
    int64_t b, g, first, count;
    int64_t position[LANES]; /* of the lane's token; beyond `count` that of the last one */
} Lanes;

static int64_t token_of(const Attention *a, const Lanes *lanes, int64_t lane) { return (lanes->first + lane) / a->group; }

static int64_t head_of(const Attention *a, const Lanes *lanes, int64_t lane) {
    return lanes->g * a->group + (lanes->first + lane) % a->group;
}

/* Which of the `count` keys from position `at` on each lane sees; 0 when every lane sees all of them. */
static int mask(const Attention *a, const Lanes *lanes, int64_t at, int64_t count, float *from, float *to) {
    if (lanes->position[0] >= at + count - 1 && first_visible(a, lanes->position[LANES - 1]) <= at) return 0;
    for (int64_t lane = 0; lane < LANES; lane++) {
        const int64_t begin = first_visible(a, lanes->position[lane]) - at, end = lanes->position[lane] + 1 - at;
        from[lane] = (float)smaller(greater(begin, 0), count);
        to[lane] = (float)greater(smaller(end, count), 0);
    }
    return 1;
}

static void give_out(const Attention *a, const Lanes *lanes, const ManyQueries *many, float *row_LD) {
    a->loops->transpose(many->attended, LANES, a->D, lanes->count, row_LD, a->D);
    for (int64_t lane = 0; lane < lanes->count; lane++) {
        const int64_t h = head_of(a, lanes, lane), t = token_of(a, lanes, lane);
        float *y = a->attended + ((lanes->b * a->T + t) * a->H + h) * a->D, share = 1.0f / many->total[lane];
        for (int64_t d = 0; d < a->D; d++) y[d] = row_LD[lane * a->D + d] * share;
    }
}

static void attend_floats(const Attention *a, const ManyQueries *many, const Slots *slots, float *wide_key,
                          const float *from, const float *to) {
    const float *key = slots->key, *value = slots->value;
    if (slots->kind != RING_FLOAT) {
        float *wide_value = wide_key + BLOCK * round_up(a->D, WIDEST) + WIDEST;
        a->loops->widen(slots->kind, slots->key, slots->key_scale, slots->count, a->D, wide_key);
        a->loops->widen(slots->kind, slots->value, slots->value_scale, slots->count, a->D, wide_value);
        key = wide_key;
        value = wide_value;
    }
    a->loops->attend_many(many, key, value, slots->count, from, to);
}

static void attend_pairs(const RoundedLoops *rounded, const ManyQueries *many, const Slots *slots, float *memory,
                         const float *from, const float *to) {
    uint32_t *key = (uint32_t *)(void *)memory, *value = key + ROUNDED_BLOCK * (many->D / 2);
    rounded->round_slots(slots, many->D, key, value);
    rounded->attend_many(many, key, value, slots->count, from, to);
}

/* Rounded products are computed for all LANES and take half the time, so that they need more than half of the lanes. */
static const RoundedLoops *rounded_for(const Attention *a, const Lanes *lanes) {
    return a->count[lanes->b] >= ROUNDED_TOKENS && lanes->count > LANES / 2 ? a->rounded : NULL;
}

void attend_block(const Attention *a, int64_t b, int64_t g, int64_t first, float *memory) {
    Lanes lanes = {.b = b, .g = g, .first = first, .count = smaller(LANES, a->count[b] * a->group - first)};
    for (int64_t lane = 0; lane < LANES; lane++)
        lanes.position[lane] = a->start[b] + token_of(a, &lanes, smaller(lane, lanes.count - 1));
    const RoundedLoops *rounded = rounded_for(a, &lanes);
    const int64_t most = rounded != NULL ? ROUNDED_BLOCK : BLOCK;
    ManyQueries many = {.lanes = round_up(lanes.count, WIDEST), .D = a->D};
    many.query = memory;
    many.attended = many.query + a->D * LANES;
    many.greatest = many.attended + a->D * LANES;
    many.total = many.greatest + LANES;
    many.score = many.total + LANES;
    float *copied = many.score + most * LANES; /* a block of slots in the type that is computed with */

    float *row_LD = many.attended; /* free until the first block of keys */
    for (int64_t lane = 0; lane < lanes.count; lane++)
        rotated_query(a, b, head_of(a, &lanes, lane), token_of(a, &lanes, lane), row_LD + lane * a->D);
    memset(row_LD + lanes.count * a->D, 0, (size_t)((LANES - lanes.count) * a->D) * sizeof *row_LD);
    a->loops->transpose(row_LD, a->D, LANES, a->D, many.query, LANES);
    if (rounded != NULL) rounded->round_queries(many.query, a->D);
    memset(many.attended, 0, (size_t)(LANES * a->D) * sizeof *many.attended);
    for (int64_t lane = 0; lane < LANES; lane++) {
        many.greatest[lane] = -FLT_MAX;
        many.total[lane] = 0;
    }

    const int64_t end = lanes.position[LANES - 1] + 1;
    for (int64_t at = first_visible(a, lanes.position[0]); at < end;) {
        const Slots slots = slots_from(a, b, g, at, smaller(at + most, end));
        _Alignas(64) float from[LANES], to[LANES];
        const int partly = mask(a, &lanes, at, slots.count, from, to);
        if (rounded != NULL) attend_pairs(rounded, &many, &slots, copied, partly ? from : NULL, to);
        else attend_floats(a, &many, &slots, copied, partly ? from : NULL, to);
        at += slots.count;
    }
    give_out(a, &lanes, &many, many.query);
}
