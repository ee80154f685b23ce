// The stand-in for device.cuh's GPU half: the same names with the same meaning, run on the CPU.
//
// A kernel becomes a C function that runs its grid, one block after the other in a seeded order, and returns 0, or 1
// with a text that says what the kernel did that a GPU would not have survived, or might not have.
#pragma once

#include <stddef.h>

#include "block.h"
#include "numbers.h"
#include "memory.h"
#include "warps.h"
#include "faults.h"

#define DEVICE inline

namespace on_cpu {

struct Launch {  // mirrored in tests/support/cuda_cpu.py
    u64 seed, shared_bytes, params_bytes, error_bytes;
    char* error;
    u32 grid[3];
    u32 threads;
};

inline int refuse(const Launch& launch, const char* kernel, const char* why, u64 number) {
    snprintf(launch.error, launch.error_bytes, "%s cannot be launched: %s (%llu)", kernel, why, number);
    return 1;
}

inline bool run_grid(const Launch& launch) {
    const u32 count = launch.grid[0] * launch.grid[1] * launch.grid[2];
    u32* const order = static_cast<u32*>(malloc(count * sizeof(u32)));
    for (u32 i = 0; i < count; i++) {
        const u32 j = draw() % (i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    launch.error[0] = 0;
    for (u32 i = 0; i < count && !launch.error[0]; i++) {
        block.index[0] = order[i] % launch.grid[0];
        block.index[1] = order[i] / launch.grid[0] % launch.grid[1];
        block.index[2] = order[i] / launch.grid[0] / launch.grid[1];
        memset(shared_mapping.first, 0xff, shared_mapping.bytes);  // NaN in every type
        run_block();
        if (launch.error[0]) break;
        const u8* const end = shared_mapping.first + shared_mapping.bytes;
        for (const u8* p = shared_mapping.first; p < end; p++) {
            if (p == block.shared) p += block.shared_bytes;
            if (p < end && *p != 0xff) {
                snprintf(launch.error, launch.error_bytes, "%s, block (%u, %u, %u): byte %lld was written, outside the "
                         "%llu bytes of shared memory", block.kernel, block.index[0], block.index[1], block.index[2],
                         i64(p - block.shared), block.shared_bytes);
                break;
            }
        }
    }
    free(order);
    return !launch.error[0];
}

inline int run(const Launch& launch, const char* kernel, u32 most_threads, u64 params_bytes, const void* params,
               void (*body)(const void*)) {
    const u64 blocks = u64(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    if (launch.params_bytes != params_bytes)
        return refuse(launch, kernel, "its parameters have another size in C++ than was given", params_bytes);
    if (launch.threads == 0 || launch.threads % 32 || launch.threads > 1024)
        return refuse(launch, kernel, "threads are no multiple of 32 up to 1024", launch.threads);
    if (launch.threads > most_threads)
        return refuse(launch, kernel, "more threads than it is compiled for", most_threads);
    if (blocks == 0 || blocks > 1u << 24 || launch.grid[1] > 65535 || launch.grid[2] > 65535)
        return refuse(launch, kernel, "grid is empty or too large", blocks);
    block.random = (launch.seed + 1) * 0x9e3779b97f4a7c15ull | 1;
    for (int i = 0; i < 8; i++) draw();
    for (int i = 0; i < 3; i++) block.grid[i] = launch.grid[i];
    block.thread_count = launch.threads;
    block.body = body;
    block.params = params;
    block.kernel = kernel;
    block.error = launch.error;
    block.error_bytes = launch.error_bytes;
    block.running = 0;
    library = reinterpret_cast<const u8*>(reinterpret_cast<uintptr_t>(&run_thread));
    // As near to the page that may not be touched as its alignment to 128 lets it be.
    shared_mapping.unmap();
    if (!block.stacks.provide(launch.threads) || !shared_mapping.map(launch.shared_bytes, 1 << 20))
        return refuse(launch, kernel, "there is too little memory", launch.shared_bytes);
    block.shared = shared_mapping.first + (shared_mapping.bytes - launch.shared_bytes) / 128 * 128;
    block.shared_bytes = launch.shared_bytes;
    const Faults faults;
    return run_grid(launch) ? 0 : 1;
}

}  // namespace on_cpu

#define CIERZO_KERNEL(name, Params, most_threads)                                                                   \
    static void name##_body(const Params& params);                                                                  \
    extern "C" __attribute__((visibility("default"))) int name(const on_cpu::Launch* launch, const void* params) {  \
        const Params copy = *static_cast<const Params*>(params);                                                    \
        return on_cpu::run(*launch, #name, most_threads, sizeof(Params), &copy,                                     \
                           [](const void* each) { name##_body(*static_cast<const Params*>(each)); });               \
    }                                                                                                               \
    static void name##_body([[maybe_unused]] const Params& params)
