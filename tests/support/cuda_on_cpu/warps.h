// What the 32 lanes of a warp do together: shuffles, votes, tensor cores.
#pragma once

#include <fenv.h>

inline u32 thread_x() { return on_cpu::block.running; }
inline u32 block_x() { return on_cpu::block.index[0]; }
inline u32 block_y() { return on_cpu::block.index[1]; }
inline u32 block_z() { return on_cpu::block.index[2]; }
inline u32 grid_x() { return on_cpu::block.grid[0]; }
inline u32 grid_y() { return on_cpu::block.grid[1]; }
inline u32 grid_z() { return on_cpu::block.grid[2]; }
inline u32 lane() { return on_cpu::block.running & 31; }
inline u32 warp() { return on_cpu::block.running >> 5; }
inline void block_sync(ON_CPU_SITE) { on_cpu::meet_block(site); }
inline void warp_sync(ON_CPU_SITE) {
    on_cpu::meet_warp("warp_sync", site, nullptr, [](void* const (&)[32]) {});
}

namespace on_cpu {

struct Shuffle { u32 given, from, got; };

inline u32 shuffle_bits(const char* what, u32 x, u32 from, Site site) {
    Shuffle mine = {x, from & 31, 0};
    meet_warp(what, site, &mine, [](void* const (&lanes)[32]) {
        for (void* each : lanes) {
            Shuffle& to = *static_cast<Shuffle*>(each);
            to.got = static_cast<const Shuffle*>(lanes[to.from])->given;
        }
    });
    return mine.got;
}

}  // namespace on_cpu

inline u32 shuffle_xor(u32 x, u32 mask, ON_CPU_SITE) {
    return on_cpu::shuffle_bits("shuffle_xor", x, lane() ^ mask, site);
}
inline float shuffle_xor(float x, u32 mask, ON_CPU_SITE) { return bits_float(shuffle_xor(float_bits(x), mask, site)); }
inline u32 shuffle(u32 x, u32 from, ON_CPU_SITE) { return on_cpu::shuffle_bits("shuffle", x, from, site); }
inline float shuffle(float x, u32 from, ON_CPU_SITE) { return bits_float(shuffle(float_bits(x), from, site)); }

inline u32 ballot(bool x, ON_CPU_SITE) {
    on_cpu::Shuffle mine = {x, 0, 0};
    on_cpu::meet_warp("ballot", site, &mine, [](void* const (&lanes)[32]) {
        u32 votes = 0;
        for (u32 i = 0; i < 32; i++) votes |= static_cast<const on_cpu::Shuffle*>(lanes[i])->given << i;
        for (void* each : lanes) static_cast<on_cpu::Shuffle*>(each)->got = votes;
    });
    return mine.got;
}

namespace on_cpu {

struct MmaOperands { float* d; const u32* a; const u32* b; };
typedef float Row8 __attribute__((vector_size(32)));

template <typename T> inline float half_of(u32 word, u32 which) {
    T element;
    element.bits = u16(word >> (16 * which));
    return to_float(element);
}

// d += a · b, each sum in order of k. Tensor cores cut addends off where their sum's last bit stands (Fasi et al. 2021,
// "Numerical behavior of NVIDIA tensor cores"); so does this, towards zero, as often as the worst of them.
typedef const float Left[16][16], Right[16][8];
__attribute__((noinline)) inline void add_products(Left& a, Right& b, float (&d)[16][8]) {
    for (u32 row = 0; row < 16; row++) {
        Row8 sum, column;
        memcpy(&sum, d[row], sizeof sum);
        for (u32 k = 0; k < 16; k++) {
            memcpy(&column, b[k], sizeof column);
            sum += a[row][k] * column;
        }
        memcpy(d[row], &sum, sizeof sum);
    }
}
__attribute__((noinline)) inline void add_products_cut(Left& a, Right& b, float (&d)[16][8]) {
    float nearest[16][8];
    memcpy(nearest, d, sizeof nearest);
    add_products(a, b, nearest);
    const int rounding = fegetround();
    fesetround(FE_TOWARDZERO);
    add_products(a, b, d);
    fesetround(rounding);
    for (u32 i = 0; i < 128; i++)  // towards zero nothing would become infinite
        if (!isfinite(nearest[i / 8][i % 8])) d[i / 8][i % 8] = nearest[i / 8][i % 8];
}

template <typename T> inline void mma_together(void* const (&lanes)[32]) {
    float a_16x16[16][16], b_16x8[16][8], d_16x8[16][8];
    for (u32 i = 0; i < 32; i++) {
        const MmaOperands& operands = *static_cast<const MmaOperands*>(lanes[i]);
        const u32 g = i / 4, t = i % 4;
        for (u32 e = 0; e < 2; e++) {
            for (u32 r = 0; r < 4; r++)
                a_16x16[g + 8 * (r & 1)][2 * t + e + 8 * (r >> 1)] = half_of<T>(operands.a[r], e);
            for (u32 r = 0; r < 2; r++) b_16x8[2 * t + e + 8 * r][g] = half_of<T>(operands.b[r], e);
            for (u32 r = 0; r < 2; r++) d_16x8[g + 8 * r][2 * t + e] = operands.d[2 * r + e];
        }
    }
    add_products_cut(a_16x16, b_16x8, d_16x8);
    for (u32 i = 0; i < 32; i++) {
        const MmaOperands& operands = *static_cast<const MmaOperands*>(lanes[i]);
        for (u32 r = 0; r < 4; r++) operands.d[r] = d_16x8[i / 4 + 8 * (r >> 1)][2 * (i % 4) + (r & 1)];
    }
}

struct MatrixOperands { u32* r; const u8* row; };

template <bool transposed> inline void matrices_together(void* const (&lanes)[32]) {
    for (u32 i = 0; i < 32; i++) {
        const u32 g = i / 4, t = i % 4;
        for (u32 m = 0; m < 4; m++) {
            const auto element = [&](u32 row, u32 column) {
                u16 bits;
                memcpy(&bits, static_cast<const MatrixOperands*>(lanes[8 * m + row])->row + 2 * column, sizeof bits);
                return u32(bits);
            };
            static_cast<const MatrixOperands*>(lanes[i])->r[m] =
                transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                           : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
        }
    }
}

}  // namespace on_cpu

template <typename T> inline void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], ON_CPU_SITE) {
    on_cpu::MmaOperands mine = {d, a, b};
    on_cpu::meet_warp("mma_16x8x16", site, &mine, on_cpu::mma_together<T>);
}
inline void load_matrices(u32 (&r)[4], const void* row, ON_CPU_SITE) {
    on_cpu::need_shared("load_matrices", row, site);
    on_cpu::MatrixOperands mine = {r, static_cast<const u8*>(row)};
    on_cpu::meet_warp("load_matrices", site, &mine, on_cpu::matrices_together<false>);
}
inline void load_matrices_transposed(u32 (&r)[4], const void* row, ON_CPU_SITE) {
    on_cpu::need_shared("load_matrices_transposed", row, site);
    on_cpu::MatrixOperands mine = {r, static_cast<const u8*>(row)};
    on_cpu::meet_warp("load_matrices_transposed", site, &mine, on_cpu::matrices_together<true>);
}
