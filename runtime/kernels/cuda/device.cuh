// What the kernels use of a GPU, and nothing else: element types, warps, tensor cores, asynchronous copies.
//
// Kernels include this file alone, no header of CUDA: NVRTC then needs no toolkit, and the same sources compile for the
// CPU against a stand-in for this page (-DCIERZO_ON_CPU), which is how their numbers are tested where there is no GPU.
//
// A kernel is CIERZO_KERNEL(name, Params, threads) { ... }: it takes one struct by value, called `params`, whose fields
// are ordered from large to small (pointers and 64-bit integers, then 32-bit ones), so that ctypes lays it out alike.
// All shared memory is dynamic: CIERZO_SHARED(name) is its first byte, aligned to 128.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Float16 { u16 bits; };
struct BFloat16 { u16 bits; };
struct Float8 { u8 bits; };  // e4m3: 1 sign, 4 exponent (bias 7) and 3 fraction bits; no infinity, 0x7f and 0xff are NaN

#ifdef CIERZO_ON_CPU
#include "on_cpu.h"
#else

#define DEVICE __device__ __forceinline__
#define CIERZO_SHARED(name) extern __shared__ __align__(128) u8 name[]
#define CIERZO_KERNEL(name, Params, threads) \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Params params)

// -- numbers ---------------------------------------------------------------------------------------------------------
DEVICE float to_float(float x) { return x; }
DEVICE float to_float(BFloat16 x) { return __uint_as_float(u32(x.bits) << 16); }
DEVICE float to_float(Float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Rounds to nearest, ties to even; too large becomes infinite.
template <typename T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE Float16 from_float<Float16>(float x) {
    Float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> DEVICE BFloat16 from_float<BFloat16>(float x) {
    BFloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }
// 2 to the power x, and 1/x, within two units in the last place.
DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float reciprocal(float x) { return __frcp_rn(x); }
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// -- threads ---------------------------------------------------------------------------------------------------------
DEVICE u32 thread_x() { return threadIdx.x; }
DEVICE u32 block_x() { return blockIdx.x; }
DEVICE u32 block_y() { return blockIdx.y; }
DEVICE u32 block_z() { return blockIdx.z; }
DEVICE u32 grid_x() { return gridDim.x; }
DEVICE u32 grid_y() { return gridDim.y; }
DEVICE u32 grid_z() { return gridDim.z; }
DEVICE u32 lane() { return threadIdx.x & 31; }  // blocks have one dimension
DEVICE u32 warp() { return threadIdx.x >> 5; }
DEVICE void block_sync() { __syncthreads(); }
DEVICE void warp_sync() { __syncwarp(); }
// All 32 lanes of a warp take part.
DEVICE float shuffle_xor(float x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE u32 shuffle_xor(u32 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE float shuffle(float x, u32 from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE u32 shuffle(u32 x, u32 from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE u32 ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE u32 atomic_add(u32* where, u32 x) { return atomicAdd(where, x); }  // returns what was there
// Writes `to` where `from` stands; returns what was there.
DEVICE u64 compare_and_swap(u64* where, u64 from, u64 to) { return atomicCAS(where, from, to); }
DEVICE void memory_fence() { __threadfence(); }  // writes before it are seen by whoever sees writes after it

// -- memory ----------------------------------------------------------------------------------------------------------
struct alignas(16) Vector16 { u32 word[4]; };  // 16 bytes, which is what one thread loads best at once
DEVICE Vector16 load_16(const void* from) {
    Vector16 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(from));
    return v;
}
// For data that is read once (weights, rings in a decode step): it does not push other data out of the L1.
DEVICE Vector16 load_16_once(const void* from) {
    Vector16 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(from));
    return v;
}
DEVICE void store_16(void* to, Vector16 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
        :: "l"(to), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]) : "memory");
}
DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
// 16 bytes from global to shared memory, past the registers; where `valid` is false it writes zeros and reads nothing.
DEVICE void copy_async_16(void* to_shared, const void* from_global, bool valid) {
    const u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(shared_address(to_shared)), "l"(from_global), "r"(bytes) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's committed groups are under way; block_sync() then shows it to the others.
template <int pending> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory"); }

// -- tensor cores (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type") ------------------------------
// d[16, 8] += a[16, 16] · b[16, 8] over a warp. With g = lane / 4 and t = lane % 4, two elements per 32-bit register:
//   a[0] = A[g][2t, 2t+1], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..]
//   b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g]
//   d[0..1] = D[g][2t, 2t+1], d[2..3] = D[g+8][2t, 2t+1]
template <typename T> DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <> DEVICE void mma_16x8x16<BFloat16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <> DEVICE void mma_16x8x16<Float16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8×8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes,
// aligned), and gets of each matrix the elements [lane / 4][2 (lane % 4), + 1]; transposed, [2 (lane % 4), + 1][lane / 4].
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// Two floats rounded into one register, the first in the low half.
template <typename T> DEVICE u32 pack_two(float low, float high);
template <> DEVICE u32 pack_two<BFloat16>(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <> DEVICE u32 pack_two<Float16>(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
#endif

// -- what both sides have in common ----------------------------------------------------------------------------------
// e4m3 to float: its seven magnitude bits, moved to where float16's are, are 2^8 too small, denormals included.
DEVICE float to_float(Float8 x) {
    const u32 magnitude = x.bits & 0x7f;
    Float16 small;
    small.bits = u16((u32(x.bits & 0x80) << 8) | (magnitude << 7));
    return magnitude == 0x7f ? bits_float(0x7fc00000u) : to_float(small) * 256.0f;
}
// The two e4m3 in the low 16 bits, each as a 16-bit T, which holds all of them.
#if !defined(CIERZO_ON_CPU) && __CUDA_ARCH__ >= 890
template <typename T> DEVICE u32 widen_two(u32 two);
template <> DEVICE u32 widen_two<Float16>(u32 two) {
    u32 r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(u16(two)));
    return r;
}
template <> DEVICE u32 widen_two<BFloat16>(u32 two) {
    const u32 halves = widen_two<Float16>(two);
    Float16 low, high;
    low.bits = u16(halves);
    high.bits = u16(halves >> 16);
    return pack_two<BFloat16>(to_float(low), to_float(high));
}
#else
template <typename T> DEVICE u32 widen_two(u32 two) {
    Float8 low, high;
    low.bits = u8(two);
    high.bits = u8(two >> 8);
    return pack_two<T>(to_float(low), to_float(high));
}
#endif
// Rounds to nearest, ties to even. Beyond 448, the largest, it is NaN and not the largest: nothing is clipped unseen.
template <> DEVICE Float8 from_float<Float8>(float x) {
    const u32 sign = (float_bits(x) >> 24) & 0x80, magnitude = float_bits(x) & 0x7fffffffu;
    Float8 y;
    if (!(bits_float(magnitude) <= 464.0f)) {  // 464 lies half-way to where 480 would be, and the tie goes to 448
        y.bits = u8(sign | 0x7f);
    } else if (magnitude < 0x3c800000u) {  // below 2^-6 the step is 2^-9: let float's own addition round to it
        y.bits = u8(sign | (float_bits(bits_float(magnitude) + 16384.0f) - 0x46800000u));
    } else {
        const u32 even = (magnitude >> 20) & 1;
        y.bits = u8(sign | ((magnitude - 0x3c000000u + 0x7ffffu + even) >> 20));
    }
    return y;
}
