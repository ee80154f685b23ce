// Few tokens: dot products of the chosen experts' rows, each loaded once for all tokens that chose the expert.
#pragma once
#include "moe_matrix.cuh"

constexpr u32 NOT_CHOSEN = 0xff;  // in place of an assignment n·K + k, of which there are at most 128
constexpr u32 MOST_ASSIGNMENTS = 128;

// An assignment's expert, or -1 where nothing is to be read: the weight is zero, or there is no such expert.
DEVICE int expert_to_read(const i64* expert, const float* weight, u32 assignment, u32 experts) {
    const i64 e = expert[assignment];
    return weight[assignment] != 0.0f && e >= 0 && e < i64(experts) ? int(e) : -1;
}

DEVICE Vector16 nothing_16() {
    Vector16 v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.word[i] = 0;
    return v;
}

// 16 bytes of each of several rows at a time, on their way from global memory through shared memory to the thread that
// asked for them, PIPE - 1 steps ahead of their use. Loads into registers would do, but ptxas puts them off until just
// before their use, where it saves registers, and then a thread waits for them one by one.
constexpr u32 PIPE = 4;

template <int Rows, u32 Threads> struct Pipe {
    u8* slots;  // PIPE · Rows · Threads · 16 bytes of shared memory, each thread's own
    u32 filling, emptying;

    DEVICE explicit Pipe(u8* slots) : slots(slots + thread_x() * 16), filling(0), emptying(0) {}

    // `piece` counts 16 bytes; where it is not below `pieces` zeros come.
    DEVICE void fill(const u8* const (&from)[Rows], u32 piece, u32 pieces) {
        const bool inside = piece < pieces;
#pragma unroll
        for (int r = 0; r < Rows; r++)
            copy_async_16(slots + (filling * Rows + r) * (Threads * 16), from[r] + (inside ? 16 * u64(piece) : 0), inside);
        copy_async_commit();
        filling = filling + 1 == PIPE ? 0 : filling + 1;
    }
    DEVICE void empty(Vector16 (&rows)[Rows]) {
        copy_async_wait<PIPE - 2>();
#pragma unroll
        for (int r = 0; r < Rows; r++)
            rows[r] = *reinterpret_cast<const Vector16*>(slots + (emptying * Rows + r) * (Threads * 16));
        emptying = emptying + 1 == PIPE ? 0 : emptying + 1;
    }
};
