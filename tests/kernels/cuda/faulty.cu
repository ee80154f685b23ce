// Kernels that are wrong, each in one way that a GPU may let pass, to be found by running them on the CPU.
#include "device.cuh"

// to [threads]. MISTAKE says which.
struct Mistake { float* to; const float* from; int index; };

CIERZO_KERNEL(faulty, Mistake, 128) {
    CIERZO_SHARED(shared);
    float* const numbers = reinterpret_cast<float*>(shared);
    float local[4] = {0.0f, 1.0f, 2.0f, 3.0f};
    float got = 0.0f;
    const u32 other = (thread_x() + 37) % 128;
    numbers[thread_x()] = float(thread_x());
#if MISTAKE == 1  // nobody waits for the others' numbers
    got = numbers[other];
#elif MISTAKE == 2  // lanes are taken to be in lockstep
    got = numbers[thread_x() ^ 1];
#elif MISTAKE == 3  // the second round overwrites what the first still reads
    for (int round = 0; round < 2; round++) {
        numbers[thread_x()] = float(thread_x() + round * 128);
        block_sync();
        got += numbers[other];
    }
#elif MISTAKE == 4  // reads what nobody wrote
    block_sync();
    got = numbers[128 + lane()];
#elif MISTAKE == 5  // writes past the end, by less than an aligned block
    if (thread_x() == 0) numbers[params.index] = 1.0f;
#elif MISTAKE == 6  // the copy is not waited for
    copy_async_16(numbers + 4 * lane(), params.from + 4 * lane(), true);
    copy_async_commit();
    got = numbers[4 * lane()];
#elif MISTAKE == 7  // a stage of a pipeline is refilled while others still read it
    got = numbers[thread_x()];
    block_sync();
    if (warp() == 0) copy_async_16(numbers + 4 * lane(), params.from + 4 * lane(), true);
    got = numbers[other];
    copy_async_commit();
    copy_async_wait<0>();
    block_sync();
#elif MISTAKE == 8
    if (lane() != 5) got = shuffle_xor(float(lane()), 1u);
#elif MISTAKE == 9
    if (lane() < 16) got = shuffle_xor(float(lane()), 1u); else got = float(ballot(true));
#elif MISTAKE == 10
    if (warp() != 2) block_sync();
#elif MISTAKE == 11
    if (thread_x() == 77) return;
    block_sync();
#elif MISTAKE == 12
    got = *reinterpret_cast<const float*>(reinterpret_cast<const u8*>(params.from) + 2);
#elif MISTAKE == 13
    got = float(load_16(params.from + 1).word[0]);
#elif MISTAKE == 14
    got = local[params.index];
#elif MISTAKE == 15
    got = params.from[i64(1) << 44];
#elif MISTAKE == 16
    got = float(load_16(numbers).word[0]);
#elif MISTAKE == 17
    u32 r[4];
    load_matrices(r, shared + 256 * lane());
    got = float(r[0]);
#elif MISTAKE == 18
    got = float(1u << params.index);
#elif MISTAKE == 19
    if (thread_x() == 0) params.to[128] = 1.0f;
#elif MISTAKE == 20
    got = numbers[i64(1) << 16];
#elif MISTAKE == 22  // just behind the last of 128
    got = params.from[params.index + thread_x()];
#elif MISTAKE == 23
    got = float(reinterpret_cast<const Vector16*>(shared + 8)->word[0]);
#elif MISTAKE == 24
    const Vector16 copied = *reinterpret_cast<const Vector16*>(shared + 8 * (thread_x() % 2));
    got = float(copied.word[thread_x() % 4]);
#elif MISTAKE == 25  // a copy of nothing still has an address
    copy_async_16(numbers + 4 * thread_x() % 128, params.from + 1, false);
#elif MISTAKE == 26  // a stage is filled again before its first copy was waited for
    for (int round = 0; round < 2; round++) {
        copy_async_16(numbers + 4 * lane(), params.from + 4 * lane(), true);
        copy_async_commit();
    }
    copy_async_wait<0>();
#elif MISTAKE == 21
    got = float(128 / (params.index - 256));
#endif
    params.to[thread_x()] = got + local[thread_x() % 4];
}
