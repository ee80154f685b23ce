// MixtureOfExperts for few tokens, second half: y[n] = Σ_k weight[n, k] · down_e · hidden[n, k], e = expert[n, k].
//
// A block has ROWS rows of all experts that were chosen. SPLIT of its warps share an expert's rows, and as many experts
// are under way as there are such groups; which group has an expert does not change its numbers. Products meet in
// shared memory and are added there, first over the warps of a split and then over k, each in order.

#ifndef ELEMENT
#define ELEMENT BFloat16
#define TOKENS 1  // 1, 2, 4, 8: as many as there are, or more
#define SPLIT 8   // 1, 2, 4, 8: decided by I alone
#endif

#include "moe_matrix.cuh"
#include "moe_products.cuh"

constexpr int ROWS = 4, WARPS = 8, GROUPS = WARPS / SPLIT;  // ROWS divide C
constexpr u32 SLOT_BYTES = PIPE * ROWS * 32 * WARPS * 16;

struct DecodeDownParams {
    const ELEMENT* hidden;  // [N, K, I]
    const float* weight;    // [N, K]
    const i64* expert;      // [N, K]
    Matrix down;            // [E, C, I]
    ELEMENT* y;             // [N, C]
    u32 tokens, top_k, experts, hidden_size, intermediate, block;
};

// In shared memory, behind the slots and before the products [N, K, ROWS, SPLIT]. As many bytes as the launcher counts on.
struct Choice {
    int expert[MOST_ASSIGNMENTS];         // -1: nothing to read
    u32 first[MOST_ASSIGNMENTS];          // whether no token before it chose the same expert
    u8 place[MOST_ASSIGNMENTS][TOKENS];   // where that is so: the assignments of each token to its expert
};

DEVICE void find_choice(Choice& choice, const DecodeDownParams& params) {
    const u32 t = thread_x(), K = params.top_k, assignments = params.tokens * K;
    if (t < assignments) choice.expert[t] = expert_to_read(params.expert, params.weight, t, params.experts);
    block_sync();
    if (t < assignments) {
        const int expert = choice.expert[t];
        bool first = expert >= 0;
        for (u32 n = 0, other = 0; n < TOKENS; n++) {
            u32 place = NOT_CHOSEN;
            for (u32 k = 0; n < params.tokens && k < K; k++, other++) {
                if (choice.expert[other] != expert) continue;
                first = first && other >= t;
                place = other;
            }
            choice.place[t][n] = u8(place);
        }
        choice.first[t] = first;
    }
}

CIERZO_KERNEL(moe_decode_down, DecodeDownParams, 32 * WARPS) {
    CIERZO_SHARED(memory);
    Choice& choice = *reinterpret_cast<Choice*>(memory + SLOT_BYTES);
    float* product = reinterpret_cast<float*>(memory + SLOT_BYTES + sizeof(Choice));  // [N, K, ROWS, SPLIT]
    const u32 K = params.top_k, C = params.hidden_size, I = params.intermediate, assignments = params.tokens * K;
    const u32 group = warp() / SPLIT, part = warp() % SPLIT, first_row = block_x() * ROWS;
    for (u32 i = thread_x(); i < assignments * ROWS * SPLIT; i += 32 * WARPS) product[i] = bits_float(0x7fc00000u);
    find_choice(choice, params);
    block_sync();
    u32 turn = 0;
    for (u32 assignment = 0; assignment < assignments; assignment++) {
        if (!choice.first[assignment] || turn++ % GROUPS != group) continue;
        const u8* place = choice.place[assignment];
        Row row[ROWS];
        const ELEMENT* x[TOKENS];
        u32 tokens = 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            row[r] = row_of(params.down, u64(choice.expert[assignment]) * C + first_row + r, I, params.block);
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
            tokens |= place[n] == NOT_CHOSEN ? 0u : 1u << n;
            x[n] = params.hidden + i64(place[n]) * I;
        }
        float sum[TOKENS][ROWS] = {};
        add_products<TOKENS, ROWS, 32 * WARPS>(sum, row, x, tokens, part * 32 + lane(), SPLIT * 32, I, params.block,
                                               memory);
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
            if (TOKENS > 1 && !(tokens >> n & 1)) continue;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float total = warp_sum(sum[n][r]);
                if (lane() == 0) product[(place[n] * ROWS + r) * SPLIT + part] = total;
            }
        }
    }
    block_sync();
    const u32 n = thread_x() / ROWS, r = thread_x() % ROWS;
    if (n >= params.tokens) return;
    float y = 0.0f;
    for (u32 k = 0; k < K; k++) {
        const float weight = params.weight[n * K + k];
        if (weight == 0.0f) continue;
        float dot = 0.0f;
        for (u32 s = 0; s < SPLIT; s++) dot += product[((n * K + k) * ROWS + r) * SPLIT + s];
        y = multiply_add(weight, dot, y);
    }
    params.y[i64(n) * C + first_row + r] = from_float<ELEMENT>(y);
}
