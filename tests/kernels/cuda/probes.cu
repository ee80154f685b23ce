// One small kernel for each thing that device.cuh offers, so that tests can look at it alone.
#include "device.cuh"

struct Convert { const void* from; void* to; int count; };

template <typename From, typename To, typename How> DEVICE void each(const Convert& convert, How how) {
    for (int i = int(thread_x()); i < convert.count; i += 128)
        static_cast<To*>(convert.to)[i] = how(static_cast<const From*>(convert.from)[i]);
}

struct Widen { template <typename T> DEVICE float operator()(T x) const { return to_float(x); } };
template <typename T> struct Narrow { DEVICE T operator()(float x) const { return from_float<T>(x); } };
struct Power { DEVICE float operator()(float x) const { return exp2_fast(x); } };
struct Inverse { DEVICE float operator()(float x) const { return reciprocal(x); } };
template <typename T> struct Pack { DEVICE u32 operator()(float x) const { return pack_two<T>(x, -x); } };

CIERZO_KERNEL(widen_bfloat16, Convert, 128) { each<BFloat16, float>(params, Widen()); }
CIERZO_KERNEL(widen_float16, Convert, 128) { each<Float16, float>(params, Widen()); }
CIERZO_KERNEL(widen_float8, Convert, 128) { each<Float8, float>(params, Widen()); }
CIERZO_KERNEL(narrow_bfloat16, Convert, 128) { each<float, BFloat16>(params, Narrow<BFloat16>()); }
CIERZO_KERNEL(narrow_float16, Convert, 128) { each<float, Float16>(params, Narrow<Float16>()); }
CIERZO_KERNEL(narrow_float8, Convert, 128) { each<float, Float8>(params, Narrow<Float8>()); }
CIERZO_KERNEL(pack_bfloat16, Convert, 128) { each<float, u32>(params, Pack<BFloat16>()); }
CIERZO_KERNEL(pack_float16, Convert, 128) { each<float, u32>(params, Pack<Float16>()); }
CIERZO_KERNEL(power, Convert, 128) { each<float, float>(params, Power()); }
CIERZO_KERNEL(inverse, Convert, 128) { each<float, float>(params, Inverse()); }

// a [16, 16] row by row, b [8, 16] (a column of B after the other), d [16, 8]: added to, once per warp, by fragments.
struct Product { const u32* a; const u32* b; float* d; };
template <typename T> DEVICE void multiply(const Product& product) {
    const u32 g = lane() / 4, t = lane() % 4;
    const u32 a[4] = {product.a[g * 8 + t], product.a[(g + 8) * 8 + t], product.a[g * 8 + t + 4],
                      product.a[(g + 8) * 8 + t + 4]};
    const u32 b[2] = {product.b[g * 8 + t], product.b[g * 8 + t + 4]};
    float* const d = product.d + warp() * 128;
    float own[4] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1], d[(g + 8) * 8 + 2 * t], d[(g + 8) * 8 + 2 * t + 1]};
    mma_16x8x16<T>(own, a, b);
    for (u32 i = 0; i < 4; i++) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = own[i];
}
CIERZO_KERNEL(multiply_bfloat16, Product, 64) { multiply<BFloat16>(params); }
CIERZO_KERNEL(multiply_float16, Product, 64) { multiply<Float16>(params); }

// Of 4 matrices [4, 8, 8] of 16-bit elements, what each lane gets: [2, 32, 4] registers, the second half transposed.
struct Matrices { const void* from; u32* to; };
CIERZO_KERNEL(matrices, Matrices, 32) {
    CIERZO_SHARED(shared);
    copy_async_16(shared + 16 * thread_x(), static_cast<const u8*>(params.from) + 16 * thread_x(), true);
    copy_async_commit();
    copy_async_wait<0>();
    block_sync();
    u32 r[4];
    load_matrices(r, shared + 16 * lane());
    for (u32 i = 0; i < 4; i++) params.to[lane() * 4 + i] = r[i];
    load_matrices_transposed(r, shared + 16 * lane());
    for (u32 i = 0; i < 4; i++) params.to[128 + lane() * 4 + i] = r[i];
}

// What the lanes of a warp tell each other: to [4, threads] of sums, exchanges, and votes; counted [1] by every thread.
struct Talk { const float* from; float* to; u32* counted; u64* swapped; };
CIERZO_KERNEL(talk, Talk, 96) {
    const float x = params.from[thread_x()];
    float sum = x;
    for (u32 mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    float* const to = params.to + thread_x();
    to[0] = sum;
    to[96] = shuffle(x, (lane() * 5 + 1) % 32);  // each lane asks another
    to[192] = bits_float(shuffle(float_bits(x), 7) ^ shuffle_xor(float_bits(x), 3u) ^ float_bits(x));
    to[288] = bits_float(ballot(x > 0.0f));
    warp_sync();
    atomic_add(params.counted, thread_x());
    memory_fence();
    compare_and_swap(params.swapped, block_x(), block_x() + 1);
}

// Where a thread stands: to [grid z, y, x, threads, 7].
struct Place { u32* to; };
CIERZO_KERNEL(places, Place, 64) {
    const u32 which = (block_z() * grid_y() + block_y()) * grid_x() + block_x();
    u32* const to = params.to + (which * 64 + thread_x()) * 7;
    to[0] = block_x();
    to[1] = block_y();
    to[2] = block_z();
    to[3] = grid_x() * 100 + grid_y() * 10 + grid_z();
    to[4] = thread_x();
    to[5] = warp();
    to[6] = lane();
}

// What copy_async has brought at each stage of its life. to: words of 64 threads, [6, 64, 4]: 0 after the issue, 1 after
// the wait for one group of two, 2 of its other group then, 3 after the wait for both, 4 where nothing is valid, 5 load_16.
struct Copies { const u8* from; u8* to; };
CIERZO_KERNEL(copies, Copies, 64) {
    CIERZO_SHARED(shared);
    u8* const first = shared + 16 * thread_x();
    u8* const second = first + 1024;
    u8* const third = first + 2048;
    const u8* const from = params.from + 16 * thread_x();
    const auto show = [&](u32 stage, const void* what) {
        Vector16 seen = *static_cast<const Vector16*>(what);
        store_16(params.to + (stage * 64 + thread_x()) * 16, seen);
    };
    *reinterpret_cast<Vector16*>(third) = load_16(from);
    copy_async_16(first, from, true);
    copy_async_commit();
    copy_async_16(second, from + 1024, true);
    copy_async_16(third, nullptr, false);
    copy_async_commit();
    show(0, first);
    copy_async_wait<1>();
    show(1, first);
    show(2, second);
    copy_async_wait<0>();
    show(3, second);
    show(4, third);
    const Vector16 loaded = load_16_once(from);
    show(5, &loaded);
}
