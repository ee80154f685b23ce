// What rolling attention does to single numbers: the turn of RoPE, rounding to a ring's type, widening out of it.
#pragma once
#include "device.cuh"

template <typename A, typename B> struct Same { static constexpr bool value = false; };
template <typename A> struct Same<A, A> { static constexpr bool value = true; };

// RoPE (Su et al. 2021, arXiv:2104.09864). Spelled out to the last rounding: every kernel gets the same bits.
struct Pair { float first, second; };
DEVICE Pair turned(Pair x, float cos, float sin) {
    const float turn_first = x.second * sin, turn_second = x.first * sin;
    return {multiply_add(x.first, cos, -turn_first), multiply_add(x.second, cos, turn_second)};
}
// Where the halves of pair i stand in a head of `size` numbers.
template <bool interleaved> DEVICE u32 first_of_pair(u32 i) { return interleaved ? 2 * i : i; }
template <bool interleaved, u32 size> DEVICE u32 second_of_pair(u32 i) {
    return interleaved ? 2 * i + 1 : i + size / 2;
}

// What a ring holds of x: NaN where its type, or that of the activations, which attention widens it to, has no finite
// number for it. (An infinite key that a query points away from would get no weight at all, and nobody would see it.)
template <typename Ring, typename Activation> DEVICE Ring to_ring(float x) {
    const Ring rounded = from_float<Ring>(x);
    float seen = to_float(rounded);
    if constexpr (!Same<Ring, Activation>::value) seen = to_float(from_float<Activation>(seen));
    return seen - seen == 0.0f ? rounded : from_float<Ring>(bits_float(0x7fc00000u));
}

// Two numbers of a ring of 16 bits each, as the activation's type.
template <typename Ring, typename Activation> DEVICE u32 widened_two(u32 two) {
    if constexpr (Same<Ring, Activation>::value) {
        return two;
    } else {
        Ring low, high;
        low.bits = u16(two & 0xffff);
        high.bits = u16(two >> 16);
        return pack_two<Activation>(to_float(low), to_float(high));
    }
}

// Two of the four e4m3 in a register, numbered from its low byte, as the activation's type.
template <typename Activation, int low_byte, int high_byte> DEVICE u32 widened_float8(u32 four) {
    return widen_two<Activation>((four >> (8 * low_byte) & 0xff) | (four >> (8 * high_byte) & 0xff) << 8);
}
