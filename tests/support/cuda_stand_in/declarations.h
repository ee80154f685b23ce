// CUDA 13's runtime as far as ONNX Runtime calls it, declared by hand: no test machine has CUDA's headers.
// Handles are plain pointers here, and errors plain numbers, whose layout in a call is the same.
#pragma once

#include <cstddef>
#include <cstdint>

#define CUDA_API extern "C" __attribute__((visibility("default")))

using Error = int;
using Stream = void*;
using Event = void*;

enum : Error {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_IMPLICIT = 906,
};

enum CopyKind : int { HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, BY_ADDRESS };
enum CaptureMode : int { CAPTURE_GLOBAL, CAPTURE_THREAD, CAPTURE_RELAXED };
enum MemoryKind : int { UNREGISTERED, HOST, DEVICE };

struct Dim3 {
    unsigned x, y, z;
};

// cudaLaunchConfig_t
struct LaunchConfig {
    Dim3 grid, block;
    size_t shared_bytes;
    Stream stream;
    const void* attributes;
    unsigned attribute_count;
};

// cudaPointerAttributes
struct PointerAttributes {
    int kind;
    int device;
    void* device_pointer;
    void* host_pointer;
    long reserved[8];
};

// cudaFuncAttributes
struct FunctionAttributes {
    size_t shared_bytes, constant_bytes, local_bytes;
    int max_threads, registers, ptx_version, binary_version, cache_mode;
    int max_dynamic_shared_bytes;
    char rest[96];
};

// cudaDeviceProp of CUDA 13. tests/runtime/test_cuda_stand_in.py compares the offsets with NVIDIA's own bindings.
struct DeviceProperties {
    char name[256];
    char identity[32];
    uint64_t memory_bytes;
    uint64_t block_shared_bytes;
    int block_registers;
    int warp_size;
    uint64_t memory_pitch;
    int block_threads;
    int block_dims[3];
    int grid_dims[3];
    uint64_t constant_bytes;
    int major, minor;
    uint64_t texture_alignment[2];
    int multiprocessors;
    int integrated;
    int can_map_host_memory;
    char textures_and_surfaces[164];
    int concurrent_kernels;
    char bus[24];
    int unified_addressing;
    int memory_bus_bits;
    int l2_bytes;
    int persisting_l2_bytes;
    int multiprocessor_threads;
    int priorities_and_caches[3];
    uint64_t multiprocessor_shared_bytes;
    int multiprocessor_registers;
    int managed_memory_and_boards[8];
    int cooperative_launch;
    uint64_t optin_shared_bytes;
    char rest[328];
};
static_assert(sizeof(DeviceProperties) == 1008 && offsetof(DeviceProperties, concurrent_kernels) == 560 &&
                  offsetof(DeviceProperties, optin_shared_bytes) == 672,
              "cudaDeviceProp of CUDA 13");
static_assert(sizeof(FunctionAttributes) == 144 && sizeof(PointerAttributes) == 88 && sizeof(LaunchConfig) == 56,
              "the other structures of CUDA 13");
