/* Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and writing to the ring. */
#include "attention.h"

#include <math.h>
#include <string.h>

void rotate(const float *x, const float *cos, const float *sin, int64_t D, int interleaved, float *y) {
    const int64_t half = D / 2;
    if (interleaved) {
        for (int64_t i = 0; i < half; i++) {
            const float a = x[2 * i], b = x[2 * i + 1];
            y[2 * i] = a * cos[i] - b * sin[i];
            y[2 * i + 1] = b * cos[i] + a * sin[i];
        }
    } else {
        const float *restrict low = x, *restrict high = x + half;
        float *restrict y_low = y, *restrict y_high = y + half;
        for (int64_t i = 0; i < half; i++) {
            const float a = low[i], b = high[i];
            y_low[i] = a * cos[i] - b * sin[i];
            y_high[i] = b * cos[i] + a * sin[i];
        }
    }
}

void rotated_query(const Attention *a, int64_t b, int64_t h, int64_t t, float *y) {
    const int64_t angles = (b * a->T + t) * (a->D / 2);
    rotate(a->query + ((b * a->T + t) * a->H + h) * a->D, a->cos + angles, a->sin + angles, a->D, a->interleaved, y);
    for (int64_t d = 0; d < a->D; d++) y[d] *= a->scale;
}

/* A key that overflowed would only have no weight where a query points away from it: NaN shows everywhere. */
static void mark_infinite(uint16_t *half, int64_t D) {
    for (int64_t d = 0; d < D; d++) half[d] |= (half[d] & 0x7c00) == 0x7c00 ? 0x0200 : 0;
}

/* Rounded to 8 bits, nothing infinite and no NaN can be told from a number, and so the scale has to. */
static int all_finite(const float *x, int64_t D) {
    uint32_t most = 0;
    for (int64_t d = 0; d < D; d++) {
        uint32_t bits;
        memcpy(&bits, x + d, sizeof bits);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    return most < 0x7f800000u;
}

/* One vector into slot number `slot` of all slots of all rows and heads. */
static void put(const Attention *a, const float *x, void *ring, float *scale, int64_t slot) {
    char *to = (char *)ring + slot * a->D * (int64_t)ring_element(a->kind);
    switch (a->kind) {
    case RING_FLOAT: memcpy(to, x, (size_t)a->D * sizeof *x); break;
    case RING_HALF:
        a->loops->to_half(x, (uint16_t *)(void *)to, a->D);
        mark_infinite((uint16_t *)(void *)to, a->D);
        break;
    default:
        scale[slot] = a->loops->to_int8(x, (int8_t *)to, a->D);
        if (!all_finite(x, a->D)) scale[slot] = NAN;
        break;
    }
}

void write_token(const Attention *a, int64_t b, int64_t g, int64_t t) {
    const int64_t angles = (b * a->T + t) * (a->D / 2), from = ((b * a->T + t) * a->G + g) * a->D;
    const int64_t slot = (b * a->G + g) * a->S + (a->start[b] + t) % a->S;
    float rotated[MOST_HEAD_DIM];
    rotate(a->key + from, a->cos + angles, a->sin + angles, a->D, a->interleaved, rotated);
    put(a, rotated, a->key_ring, a->key_scale, slot);
    put(a, a->value + from, a->value_ring, a->value_scale, slot);
}

Slots slots_from(const Attention *a, int64_t b, int64_t g, int64_t position, int64_t end) {
    const int64_t in_ring = position % a->S, slot = (b * a->G + g) * a->S + in_ring, left = a->S - in_ring;
    const int64_t byte = slot * a->D * (int64_t)ring_element(a->kind);
    Slots slots = {.kind = a->kind, .key = (const char *)a->key_ring + byte, .value = (const char *)a->value_ring + byte};
    if (a->kind == RING_INT8) {
        slots.key_scale = a->key_scale + slot;
        slots.value_scale = a->value_scale + slot;
    }
    slots.count = end - position < left ? end - position : left;
    return slots;
}
