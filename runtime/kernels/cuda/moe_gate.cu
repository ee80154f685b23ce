// MoEGate: the K best of each token's E router logits, and softmax over these.
//
// A warp has one token; lane l holds the logits of experts l, l + 32, ... In each of K rounds the best that is left is
// found by its order key, so that a NaN takes no part in comparisons; the weights see it all the same.
#include "order.cuh"

#ifndef PER_LANE
#define PER_LANE 1  // ⌈E / 32⌉
#endif

struct GateParams {
    const float* logits;  // [N, E]
    float* weight;        // [N, K]
    i64* expert;          // [N, K]
    i64 tokens;
    u32 experts, top_k;
};

// NaN is below all numbers. 0 is free for what must not be taken.
DEVICE u32 order_key(float x) { return x == x ? ordered_bits(x) : 1u; }

CIERZO_KERNEL(moe_gate, GateParams, 128) {
    const i64 token = i64(block_x()) * 4 + warp();
    if (token >= params.tokens) return;
    const u32 E = params.experts, K = params.top_k;
    const float* logits = params.logits + token * E;
    float value[PER_LANE];
    u32 key[PER_LANE];
    bool fault = false;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const u32 e = lane() + 32 * i;
        value[i] = e < E ? logits[e] : 0.0f;
        key[i] = e < E ? order_key(value[i]) : 0u;
        fault = fault || value[i] != value[i];
    }
    float mine = 0.0f, best_of_all = 0.0f;  // lane k keeps what is chosen in round k
    u32 my_expert = 0;
    for (u32 k = 0; k < K; k++) {
        u32 best = 0, where = 0;
        float found = 0.0f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const bool better = key[i] > best;  // of equals the first stays, which is the lower expert
            found = better ? value[i] : found;
            where = better ? lane() + 32 * i : where;
            best = better ? key[i] : best;
        }
#pragma unroll
        for (u32 step = 16; step; step /= 2) {
            const u32 other = shuffle_xor(best, step), other_where = shuffle_xor(where, step);
            const float other_found = shuffle_xor(found, step);
            const bool better = other > best || (other == best && other_where < where);
            best = better ? other : best;
            where = better ? other_where : where;
            found = better ? other_found : found;
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) key[i] = where == lane() + 32 * i ? 0u : key[i];
        if (k == 0) best_of_all = found;
        if (lane() == k) {
            mine = found;
            my_expert = where;
        }
    }
    const float part = lane() < K ? exp2_fast((mine - best_of_all) * 1.4426950408889634f) : 0.0f;
    float total = part;
#pragma unroll
    for (u32 step = 16; step; step /= 2) total += shuffle_xor(total, step);
    const bool faulty = ballot(fault) != 0;
    if (lane() < K) {
        params.weight[token * K + lane()] = faulty ? bits_float(0x7fc00000u) : part / total;
        params.expert[token * K + lane()] = my_expert;
    }
}
