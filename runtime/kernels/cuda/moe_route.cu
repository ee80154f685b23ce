// The tokens of each expert: a block per expert goes through all assignments n·K + k, in order.
//
// An assignment whose weight is zero, or whose expert there is none of, is in no list.
#include "device.cuh"

struct RouteParams {
    const i64* expert;    // [N, K]
    const float* weight;  // [N, K]
    u32* list;            // [E, N]: the assignments to each expert, as many as `count` says
    u32* count;           // [E]
    u32 assignments, tokens;
};

constexpr u32 WARPS = 8, AT_ONCE = 4;

DEVICE u32 bits_set(u32 x) {
    x -= (x >> 1) & 0x55555555u;
    x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
    return (((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24;
}

CIERZO_KERNEL(moe_route, RouteParams, 32 * WARPS) {
    CIERZO_SHARED(memory);
    u32* found = reinterpret_cast<u32*>(memory);  // [WARPS]
    const u32 expert = block_x(), below = (1u << lane()) - 1;
    u32* list = params.list + u64(expert) * params.tokens;
    u32 listed = 0;
    for (u32 base = 0; base < params.assignments; base += 32 * WARPS * AT_ONCE) {
        const u32 first = base + warp() * (32 * AT_ONCE) + lane();
        u32 hits[AT_ONCE], mine = 0;
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            const u32 a = first + 32 * j;
            hits[j] = a < params.assignments && params.expert[a] == i64(expert) && params.weight[a] != 0.0f;
        }
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            hits[j] = ballot(hits[j] != 0);
            mine += bits_set(hits[j]);
        }
        if (lane() == 0) found[warp()] = mine;
        block_sync();
        u32 before = listed;
        for (u32 w = 0; w < WARPS; w++) {
            before += w < warp() ? found[w] : 0;
            listed += found[w];
        }
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++) {
            const u32 at = before + bits_set(hits[j] & below);
            // A token that names an expert twice must not make a list longer than its room.
            if (hits[j] >> lane() & 1 && at < params.tokens) list[at] = first + 32 * j;
            before += bits_set(hits[j]);
        }
        block_sync();
    }
    if (thread_x() == 0) params.count[expert] = listed < params.tokens ? listed : params.tokens;
}
