// The end of MixtureOfExperts for many tokens: y[n] = Σ_k weight[n, k] · product[n, k], in order of k, rounded once.
//
// A product of weight zero is not looked at, and does not exist. An expert that there is none of gives NaN.
#include "device.cuh"

#ifndef ELEMENT
#define ELEMENT BFloat16
#endif

struct CombineParams {
    const float* product;  // [N, K, C]
    const float* weight;   // [N, K]
    const i64* expert;     // [N, K]
    ELEMENT* y;            // [N, C]
    u32 top_k, experts, hidden_size;
};

// A block per token and 8 · 128 columns.
CIERZO_KERNEL(moe_combine, CombineParams, 128) {
    const u32 C = params.hidden_size, K = params.top_k, column = (block_y() * 128 + thread_x()) * 8;
    if (column >= C) return;
    float sum[8] = {};
    for (u32 k = 0; k < K; k++) {
        const u64 assignment = u64(block_x()) * K + k;
        const float weight = params.weight[assignment];
        if (weight == 0.0f) continue;
        const bool exists = params.expert[assignment] >= 0 && params.expert[assignment] < i64(params.experts);
        Vector16 half[2];
#pragma unroll
        for (int h = 0; h < 2; h++)
            half[h] = load_16_once(params.product + (exists ? assignment * C + column + 4 * h : 0));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float product = exists ? bits_float(half[i / 4].word[i % 4]) : bits_float(0x7fc00000u);
            sum[i] = multiply_add(weight, product, sum[i]);
        }
    }
    Vector16 rounded;
#pragma unroll
    for (int i = 0; i < 4; i++) rounded.word[i] = pack_two<ELEMENT>(sum[2 * i], sum[2 * i + 1]);
    store_16(params.y + u64(block_x()) * C + column, rounded);
}
