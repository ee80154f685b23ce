// Numbers as a GPU converts them: to nearest, ties to even; a NaN comes out as the one NaN that the GPU makes.
#pragma once

#include <math.h>

inline u32 float_bits(float x) { u32 bits; memcpy(&bits, &x, sizeof bits); return bits; }
inline float bits_float(u32 bits) { float x; memcpy(&x, &bits, sizeof x); return x; }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_float(u32(x.bits) << 16); }
inline float to_float(Float16 x) {
    const u32 sign = u32(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 0x3ff;
    if (exponent == 31) return bits_float(fraction ? 0x7fffffffu : sign | 0x7f800000u);
    if (exponent == 0) return bits_float(sign | float_bits(float(fraction) * 0x1p-24f));
    return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

template <typename T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline BFloat16 from_float<BFloat16>(float x) {
    const u32 bits = float_bits(x);
    if (x != x) return {0x7fff};
    return {u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <> inline Float16 from_float<Float16>(float x) {
    const u32 sign = (float_bits(x) >> 16) & 0x8000, magnitude = float_bits(x) & 0x7fffffff;
    if (x != x) return {0x7fff};
    if (magnitude >= 0x477ff000) return {u16(sign | 0x7c00)};  // half-way beyond 65504, the largest
    if (magnitude < 0x38800000)  // below 2^-14 the step is that of 0.5 as a float, 2^-24
        return {u16(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000))};
    return {u16(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
}

inline float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;  // the GPU's flushes what is denormal
}
inline float reciprocal(float x) { return 1.0f / x; }
inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

template <typename T> inline u32 pack_two(float low, float high) {
    return u32(from_float<T>(low).bits) | u32(from_float<T>(high).bits) << 16;
}

// CUDA has these without a header.
inline int min(int a, int b) { return a < b ? a : b; }
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline i64 min(i64 a, i64 b) { return a < b ? a : b; }
inline u64 min(u64 a, u64 b) { return a < b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
inline i64 max(i64 a, i64 b) { return a > b ? a : b; }
inline u64 max(u64 a, u64 b) { return a > b ? a : b; }
inline float max(float a, float b) { return fmaxf(a, b); }
