// Floats as integers of the same order.
#pragma once
#include "device.cuh"

// 0 and -0 are alike. Of NaN it says nothing; no number gives 0, 1 or 0xffffffff.
DEVICE u32 ordered_bits(float x) {
    const u32 bits = float_bits(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float float_of_ordered(u32 key) { return bits_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }
