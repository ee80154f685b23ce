// Eight 16-bit numbers that one load brings, as floats.
#pragma once
#include "device.cuh"

template <typename T> DEVICE void widen(float (&wide)[8], const Vector16& v) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        T low, high;
        low.bits = u16(v.word[i] & 0xffff);
        high.bits = u16(v.word[i] >> 16);
        wide[2 * i] = to_float(low);
        wide[2 * i + 1] = to_float(high);
    }
}

// The sum over a warp's lanes, alike in all of them and always added in the same order.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (u32 step = 16; step; step /= 2) x += shuffle_xor(x, step);
    return x;
}
