// MixtureOfExperts for few tokens, first half: hidden[n, k] = act(gate_e · x[n]) ⊙ (up_e · x[n]), e = expert[n, k].
//
// A row of blocks per assignment (n, k), of which those run whose token is the first that chose the expert: they serve
// all tokens that did. A warp has ROWS rows of gate and of up. What a token gets depends on its own x, experts and the
// sizes C and I alone.
#include "activations.cuh"

#ifndef ELEMENT
#define ELEMENT BFloat16
#define GATED_BY silu
#define TOKENS 1  // 1, 2, 4, 8: as many as there are, or more
#endif

#include "moe_matrix.cuh"
#include "moe_products.cuh"

constexpr int ROWS = 2, WARPS = 4;  // a block has 8 rows, which divide I
constexpr u32 SLOT_BYTES = PIPE * 2 * ROWS * 32 * WARPS * 16;

struct DecodeUpParams {
    const ELEMENT* x;     // [N, C]
    const float* weight;  // [N, K]
    const i64* expert;    // [N, K]
    Matrix gate;          // [E, I, C]
    Matrix up;            // [E, I, C]
    ELEMENT* hidden;      // [N, K, I]
    u32 tokens, top_k, experts, hidden_size, intermediate, block;
};

CIERZO_KERNEL(moe_decode_up, DecodeUpParams, 32 * WARPS) {
    CIERZO_SHARED(memory);
    u32* place = reinterpret_cast<u32*>(memory + SLOT_BYTES);  // [TOKENS]: the assignment by which a token chose this expert
    const u32 K = params.top_k, C = params.hidden_size, I = params.intermediate, assignment = block_y();
    const int expert = expert_to_read(params.expert, params.weight, assignment, params.experts);
    if (expert < 0) return;
    u32 tokens = 1;
    if (TOKENS > 1) {
        if (thread_x() < TOKENS) place[thread_x()] = NOT_CHOSEN;
        block_sync();
        const u32 t = thread_x();
        if (t < params.tokens * K && expert_to_read(params.expert, params.weight, t, params.experts) == expert)
            place[t / K] = t;
        block_sync();
        tokens = 0;
#pragma unroll
        for (int n = 0; n < TOKENS; n++) tokens |= place[n] == NOT_CHOSEN ? 0u : 1u << n;
        if (tokens & ((1u << (assignment / K)) - 1)) return;
    }
    const u32 first = (block_x() * WARPS + warp()) * ROWS;
    Row row[2 * ROWS];
    const ELEMENT* x[TOKENS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const u64 index = u64(expert) * I + first + r;
        row[2 * r] = row_of(params.gate, index, C, params.block);
        row[2 * r + 1] = row_of(params.up, index, C, params.block);
    }
#pragma unroll
    for (int n = 0; n < TOKENS; n++) x[n] = params.x + i64(n) * C;
    float sum[TOKENS][2 * ROWS] = {};
    add_products<TOKENS, 2 * ROWS, 32 * WARPS>(sum, row, x, tokens, lane(), 32, C, params.block, memory);
#pragma unroll
    for (int n = 0; n < TOKENS; n++) {
        if (TOKENS > 1 && !(tokens >> n & 1)) continue;
        const u32 of = TOKENS > 1 ? place[n] : assignment;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float gate = warp_sum(sum[n][2 * r]), up = warp_sum(sum[n][2 * r + 1]);
            if (lane() == 0)
                params.hidden[i64(of) * I + first + r] = from_float<ELEMENT>(activation::GATED_BY(gate) * up);
        }
    }
}
