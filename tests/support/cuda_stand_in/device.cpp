#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "journal.h"

namespace {
constexpr uint64_t GiB = uint64_t{1} << 30;
constexpr int MiB = 1 << 20;
constexpr int KiB = 1 << 10;
constexpr int BLOCK_SHARED_BYTES = 48 * KiB, REGISTERS = 65536, CUDA_VERSION = 13000;

// NVIDIA's data sheets, and the table of features and limits by compute capability in the CUDA programming guide.
const Device DEVICES[] = {
    {"8.0", "stand-in for an A100", 80 * GiB, 108, 2048, 164 * KiB, 163 * KiB, 40 * MiB, 5120},
    {"8.6", "stand-in for an A10", 24 * GiB, 72, 1536, 100 * KiB, 99 * KiB, 6 * MiB, 384},
    {"8.9", "stand-in for an L4", 24 * GiB, 58, 1536, 100 * KiB, 99 * KiB, 48 * MiB, 192},
    {"9.0", "stand-in for an H100", 80 * GiB, 132, 2048, 228 * KiB, 227 * KiB, 50 * MiB, 5120},
    {"12.0", "stand-in for an RTX 5090", 32 * GiB, 170, 1536, 100 * KiB, 99 * KiB, 96 * MiB, 512},
};

const char* asked_for() {
    const char* capability = getenv("CIERZO_CUDA_CAPABILITY");
    return capability ? capability : "9.0";
}

bool there_is_none() { return !strcmp(asked_for(), "none"); }

int major_version() { return atoi(device().capability); }

int minor_version() { return atoi(strchr(device().capability, '.') + 1); }

int no_driver_call() { return 0; }
}  // namespace

const Device& device() {
    for (const Device& device : DEVICES)
        if (!strcmp(device.capability, asked_for())) return device;
    fprintf(stderr, "The stand-in for CUDA has no device of compute capability %s.\n", asked_for());
    abort();
}

CUDA_API Error cudaGetDeviceCount(int* count) {
    *count = there_is_none() ? 0 : 1;
    return there_is_none() ? refuse("cudaGetDeviceCount", NO_DEVICE) : SUCCESS;
}

CUDA_API Error cudaGetDevice(int* index) {
    *index = 0;
    return there_is_none() ? refuse("cudaGetDevice", NO_DEVICE) : SUCCESS;
}

CUDA_API Error cudaSetDevice(int index) {
    if (there_is_none()) return refuse("cudaSetDevice", NO_DEVICE);
    return index ? refuse("cudaSetDevice", INVALID_VALUE) : SUCCESS;
}

CUDA_API Error cudaDriverGetVersion(int* version) {
    *version = there_is_none() ? 0 : CUDA_VERSION;
    return SUCCESS;
}

CUDA_API Error cudaRuntimeGetVersion(int* version) {
    *version = CUDA_VERSION;
    return SUCCESS;
}

CUDA_API Error cudaGetDeviceProperties(DeviceProperties* properties, int index) {
    if (there_is_none() || index) return refuse("cudaGetDeviceProperties", NO_DEVICE);
    *properties = DeviceProperties{};
    strcpy(properties->name, device().name);
    properties->memory_bytes = device().memory_bytes;
    properties->block_shared_bytes = BLOCK_SHARED_BYTES;
    properties->block_registers = properties->multiprocessor_registers = REGISTERS;
    properties->warp_size = 32;
    properties->block_threads = 1024;
    properties->block_dims[0] = properties->block_dims[1] = 1024;
    properties->block_dims[2] = 64;
    properties->grid_dims[0] = 0x7fffffff;
    properties->grid_dims[1] = properties->grid_dims[2] = 65535;
    properties->constant_bytes = 64 * KiB;
    properties->major = major_version();
    properties->minor = minor_version();
    properties->multiprocessors = device().multiprocessors;
    properties->can_map_host_memory = properties->concurrent_kernels = properties->unified_addressing = 1;
    properties->memory_bus_bits = device().memory_bus_bits;
    properties->l2_bytes = device().l2_bytes;
    properties->multiprocessor_threads = device().multiprocessor_threads;
    properties->multiprocessor_shared_bytes = device().multiprocessor_shared_bytes;
    properties->cooperative_launch = 1;
    properties->optin_shared_bytes = device().optin_shared_bytes;
    return SUCCESS;
}

// attribute: a cudaDeviceAttr, whose numbers are those of the driver's CUdevice_attribute.
CUDA_API Error cudaDeviceGetAttribute(int* value, int attribute, int) {
    if (there_is_none()) return refuse("cudaDeviceGetAttribute", NO_DEVICE);
    switch (attribute) {
        case 1: *value = 1024; break;                                   // MaxThreadsPerBlock
        case 2: *value = 1024; break;                                   // MaxBlockDimX
        case 3: *value = 1024; break;                                   // MaxBlockDimY
        case 4: *value = 64; break;                                     // MaxBlockDimZ
        case 5: *value = 0x7fffffff; break;                             // MaxGridDimX
        case 6: *value = 65535; break;                                  // MaxGridDimY
        case 7: *value = 65535; break;                                  // MaxGridDimZ
        case 8: *value = BLOCK_SHARED_BYTES; break;                     // MaxSharedMemoryPerBlock
        case 10: *value = 32; break;                                    // WarpSize
        case 12: *value = REGISTERS; break;                             // MaxRegistersPerBlock
        case 16: *value = device().multiprocessors; break;              // MultiProcessorCount
        case 37: *value = device().memory_bus_bits; break;              // GlobalMemoryBusWidth
        case 38: *value = device().l2_bytes; break;                     // L2CacheSize
        case 39: *value = device().multiprocessor_threads; break;       // MaxThreadsPerMultiProcessor
        case 75: *value = major_version(); break;                       // ComputeCapabilityMajor
        case 76: *value = minor_version(); break;                       // ComputeCapabilityMinor
        case 81: *value = device().multiprocessor_shared_bytes; break;  // MaxSharedMemoryPerMultiprocessor
        case 82: *value = REGISTERS; break;                             // MaxRegistersPerMultiprocessor
        case 95: *value = 1; break;                                     // CooperativeLaunch
        case 97: *value = device().optin_shared_bytes; break;           // MaxSharedMemoryPerBlockOptin
        case 115: *value = 1; break;                                    // MemoryPoolsSupported
        default: {
            char call[64];
            snprintf(call, sizeof call, "cudaDeviceGetAttribute %d", attribute);
            stand_in_unknown(call);
        }
    }
    return SUCCESS;
}

CUDA_API Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads,
                                                                      size_t shared_bytes, unsigned) {
    const int by_threads = device().multiprocessor_threads / (threads > 0 ? threads : 1);
    const int by_memory = shared_bytes ? int(device().multiprocessor_shared_bytes / shared_bytes) : by_threads;
    *blocks = by_threads < by_memory ? by_threads : by_memory;
    return SUCCESS;
}

// Functions of the driver that are asked for by name do nothing.
CUDA_API Error cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, unsigned long long,
                                                int* result) {
    write_down("entry", name);
    *entry = reinterpret_cast<void*>(no_driver_call);
    if (result) *result = 0;
    return SUCCESS;
}
