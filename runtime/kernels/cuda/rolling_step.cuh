// One step of a warp of the decode kernel: STEP keys and values on their way from the rings to the tensor cores.
//
// Keys are the rows (m) of the first product and the inner dimension of the second, and query heads its columns (n):
// scores[STEP, 8] = keys[STEP, D] · queries[D, 8], then attended[D, 8] += values[STEP, D]ᵀ · weights[STEP, 8]. So eight
// heads that share a KV head cost what one does, and nothing is computed for the sixteen rows that m would pad them to.
//
// Two elements of an e4m3 ring fill the 16 bits that fragments are made of. They are not unpacked in shared memory: the
// inner dimension of the first product, and the rows of the second, are taken in the order that falls out.
#pragma once
#include "device.cuh"
#include "rolling_ring.cuh"

constexpr u32 RING_BYTES = sizeof(RING);
constexpr u32 STEP = RING_BYTES == 1 ? 32 : 16;          // keys that a warp takes at once
constexpr u32 BLOCKS = STEP / 16;                        // and the products over them
constexpr u32 DEPTH = HEAD_DIM / 16;                     // products over the head dim
constexpr u32 COLUMNS = (HEADS + 7) / 8;                 // and over the query heads
constexpr u32 CHUNKS = HEAD_DIM * RING_BYTES / 16;       // of 16 bytes in a key
constexpr u32 ROW = (CHUNKS | 1) * 16;                   // odd, so that eight rows' chunks lie in different banks
constexpr u32 STAGE = 2 * STEP * ROW;                    // keys, then values

// Asks for the keys and values of positions oldest + row .. + STEP - 1, those from `known` on being zeros.
// oldest_slot: of the oldest visible position, row 0. The rings are those of one KV head.
DEVICE void fetch_step(
    u8* stage, const u8* key_ring, const u8* value_ring, u32 row, u32 known, u32 oldest_slot, u32 slots
) {
#pragma unroll
    for (u32 i = lane(); i < STEP * CHUNKS; i += 32) {
        const u32 r = i / CHUNKS, chunk = i % CHUNKS;
        const bool valid = row + r < known;
        const u32 ahead = oldest_slot + row + r, slot = ahead < slots ? ahead : ahead - slots;
        const u64 offset = valid ? u64(slot) * (CHUNKS * 16) + chunk * 16 : 0;
        u8* to = stage + r * ROW + chunk * 16;
        copy_async_16(to, key_ring + offset, valid);
        copy_async_16(to + STEP * ROW, value_ring + offset, valid);
    }
}

// Fragments a[block] of the keys' columns 16 depth .. + 15, those of e4m3 in the order of `query_element`.
DEVICE void load_keys(u32 (&a)[BLOCKS][4], const u8* stage, u32 depth) {
    u32 r[4];
    if constexpr (RING_BYTES == 1) {
        load_matrices(r, stage + lane() * ROW + depth * 16);
#pragma unroll
        for (u32 block = 0; block < BLOCKS; ++block) {
            a[block][0] = widened_float8<ACTIVATION, 0, 1>(r[2 * block]);
            a[block][1] = widened_float8<ACTIVATION, 0, 1>(r[2 * block + 1]);
            a[block][2] = widened_float8<ACTIVATION, 2, 3>(r[2 * block]);
            a[block][3] = widened_float8<ACTIVATION, 2, 3>(r[2 * block + 1]);
        }
    } else {
        load_matrices(r, stage + lane() % 16 * ROW + (2 * depth + lane() / 16) * 16);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) a[0][i] = widened_two<RING, ACTIVATION>(r[i]);
    }
}
// The first of the two elements of a query that belong to register i of the second factor at this depth.
DEVICE u32 query_element(u32 depth, u32 i) {
    const u32 t = lane() % 4;
    return 16 * depth + (RING_BYTES == 1 ? 4 * t + 2 * i : 2 * t + 8 * i);
}

// Fragments a[block] of the transposed values' rows 16 depth .. + 15, in the order of `attended_element`.
DEVICE void load_values(u32 (&a)[BLOCKS][4], const u8* stage, u32 depth) {
    const u8* values = stage + STEP * ROW;
    u32 r[4];
    if constexpr (RING_BYTES == 1) {
        load_matrices_transposed(r, values + lane() * ROW + depth * 16);
#pragma unroll
        for (u32 block = 0; block < BLOCKS; ++block) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                a[block][2 * half] = widened_float8<ACTIVATION, 0, 2>(r[2 * block + half]);
                a[block][2 * half + 1] = widened_float8<ACTIVATION, 1, 3>(r[2 * block + half]);
            }
        }
    } else {
        const u32 row = lane() % 8 + lane() / 16 * 8, half = lane() / 8 % 2;
        load_matrices_transposed(r, values + row * ROW + (2 * depth + half) * 16);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) a[0][i] = widened_two<RING, ACTIVATION>(r[i]);
    }
}
// Which element of the attended row lies in the result's row lane / 4 (lower) or lane / 4 + 8 (upper).
DEVICE u32 attended_element(u32 depth, bool upper) {
    const u32 g = lane() / 4;
    return 16 * depth + (RING_BYTES == 1 ? 2 * g + upper : g + 8 * upper);
}

// An 8×8 matrix held as [lane / 4][2 (lane % 4), + 1], transposed.
DEVICE u32 transposed(u32 two) {
    const u32 column = lane() / 4, row = 2 * (lane() % 4);
    const u32 above = shuffle(two, 4 * row + column / 2), below = shuffle(two, 4 * row + 4 + column / 2);
    return column % 2 ? (above >> 16) | (below & 0xffff0000u) : (above & 0xffffu) | (below << 16);
}
