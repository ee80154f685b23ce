// The attention of a warp over its steps, with the softmax that needs the scores but once (Milakov and Gimelshein 2018,
// arXiv:1805.02867): the sums so far are scaled down whenever a larger score turns up.
//
// A lane holds, of each eight heads, 2t and 2t + 1 with t = lane % 4.
#pragma once
#include "device.cuh"
#include "rolling_step.cuh"

constexpr u32 INFINITE = 0x7f800000u;

struct Attention {
    float largest[COLUMNS][2];         // score so far, to base 2
    float total[COLUMNS][2];           // of this lane's weights, relative to 2^largest
    float attended[DEPTH][COLUMNS][4];
};

DEVICE void clear(Attention& attention) {
#pragma unroll
    for (u32 n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            attention.largest[n][i] = -bits_float(INFINITE);
            attention.total[n][i] = 0.0f;
        }
#pragma unroll
        for (u32 depth = 0; depth < DEPTH; ++depth)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) attention.attended[depth][n][i] = 0.0f;
    }
}

// What scores are measured from: the largest, or 0 where there is none, since infinity minus itself is no number.
DEVICE float reference_score(float largest) { return largest == -bits_float(INFINITE) ? 0.0f : largest; }
DEVICE float larger(float x, float y) { return x > y ? x : y; }  // y where x is NaN; weights then tell of the NaN

// Of eight heads' scores[block] to weights (rounded to the activation's type, which are what is added up too, so that
// they sum to 1), as the second factor of the product with the values; keeps largest, total and attended in step.
DEVICE void weigh(Attention& attention, float (&scores)[BLOCKS][COLUMNS][4], u32 (&weights)[BLOCKS][2], u32 n) {
    float reference[2], shrink[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        float largest = attention.largest[n][i];
#pragma unroll
        for (u32 block = 0; block < BLOCKS; ++block)
            largest = larger(scores[block][n][i], larger(scores[block][n][i + 2], largest));
#pragma unroll
        for (u32 mask = 4; mask < 32; mask *= 2) largest = larger(shuffle_xor(largest, mask), largest);
        reference[i] = reference_score(largest);
        shrink[i] = exp2_fast(attention.largest[n][i] - reference[i]);
        attention.largest[n][i] = largest;
        attention.total[n][i] *= shrink[i];
    }
#pragma unroll
    for (u32 depth = 0; depth < DEPTH; ++depth)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) attention.attended[depth][n][i] *= shrink[i % 2];
#pragma unroll
    for (u32 block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 two = pack_two<ACTIVATION>(
                exp2_fast(scores[block][n][2 * half] - reference[0]),
                exp2_fast(scores[block][n][2 * half + 1] - reference[1]));
            ACTIVATION low, high;
            low.bits = u16(two & 0xffff);
            high.bits = u16(two >> 16);
            attention.total[n][0] += to_float(low);
            attention.total[n][1] += to_float(high);
            weights[block][half] = transposed(two);
        }
    }
}

// Adds the keys and values of a stage, of which the first `visible` count. scale: of the scores, to base 2.
DEVICE void attend(
    Attention& attention, const u32 (&query)[DEPTH][COLUMNS][2], const u8* stage, u32 visible, float scale
) {
    float scores[BLOCKS][COLUMNS][4] = {};
    u32 a[BLOCKS][4];
#pragma unroll
    for (u32 depth = 0; depth < DEPTH; ++depth) {
        load_keys(a, stage, depth);
#pragma unroll
        for (u32 block = 0; block < BLOCKS; ++block)
#pragma unroll
            for (u32 n = 0; n < COLUMNS; ++n)
                mma_16x8x16<ACTIVATION>(scores[block][n], a[block], query[depth][n]);
    }
    u32 weights[COLUMNS][BLOCKS][2];
#pragma unroll
    for (u32 n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (u32 block = 0; block < BLOCKS; ++block)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const bool counts = 16 * block + lane() / 4 + i / 2 * 8 < visible;
                scores[block][n][i] = counts ? scores[block][n][i] * scale : -bits_float(INFINITE);
            }
        weigh(attention, scores, weights[n], n);
    }
#pragma unroll
    for (u32 depth = 0; depth < DEPTH; ++depth) {
        load_values(a, stage, depth);
#pragma unroll
        for (u32 block = 0; block < BLOCKS; ++block)
#pragma unroll
            for (u32 n = 0; n < COLUMNS; ++n)
                mma_16x8x16<ACTIVATION>(attention.attended[depth][n], a[block], weights[n][block]);
    }
}
