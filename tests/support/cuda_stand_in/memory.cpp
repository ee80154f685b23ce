// Device memory is memory of the host that only copies and fills can reach: an access by address ends the process, as
// it does on a machine with a GPU. Kernels do nothing, so that fresh memory holds zeros until something is copied in.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "capture.h"
#include "device.h"
#include "journal.h"

namespace {
struct Block {
    size_t bytes;
    char* reachable;  // the same memory at an address that can be read and written; null: memory of the host
};

std::map<const char*, Block> blocks;  // by the address that callers know
size_t device_bytes = 0;
std::mutex guard;

#define LOCKED const std::lock_guard<std::mutex> locked(guard)

// The block that holds the address, or null.
const std::pair<const char* const, Block>* find(const void* address) {
    auto after = blocks.upper_bound(static_cast<const char*>(address));
    if (after == blocks.begin()) return nullptr;
    const auto& found = *--after;
    return static_cast<const char*>(address) < found.first + found.second.bytes ? &found : nullptr;
}

struct Place {
    char* reachable;
    MemoryKind kind;
    bool fits;  // within its allocation
};

Place place(const void* address, size_t bytes) {
    LOCKED;
    const auto* found = find(address);
    char* const plain = static_cast<char*>(const_cast<void*>(address));
    if (!found) return {plain, UNREGISTERED, true};
    const size_t offset = static_cast<const char*>(address) - found->first;
    const bool fits = offset + bytes <= found->second.bytes;
    if (!found->second.reachable) return {plain, HOST, fits};
    return {found->second.reachable + offset, DEVICE, fits};
}

Error allocate(void** address, size_t bytes) {
    *address = nullptr;
    if (!bytes) return SUCCESS;
    const size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    LOCKED;
    if (device_bytes + whole > device().memory_bytes) return refuse("more memory than the GPU has", OUT_OF_MEMORY);
    const int file = memfd_create("cuda-stand-in", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, whole)) abort();
    void* known = mmap(nullptr, whole, PROT_NONE, MAP_SHARED, file, 0);
    void* reachable = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (known == MAP_FAILED || reachable == MAP_FAILED) abort();
    device_bytes += whole;
    blocks[static_cast<char*>(known)] = {whole, static_cast<char*>(reachable)};
    *address = known;
    return SUCCESS;
}

Error release(void* address) {
    if (!address) return SUCCESS;
    LOCKED;
    const auto found = blocks.find(static_cast<char*>(address));
    if (found == blocks.end()) return refuse("freeing what was not allocated", INVALID_VALUE);
    const Block block = found->second;
    blocks.erase(found);
    if (!block.reachable) {
        free(address);
        return SUCCESS;
    }
    device_bytes -= block.bytes;
    munmap(address, block.bytes);
    munmap(block.reachable, block.bytes);
    return SUCCESS;
}

const char* name(bool from_device, bool to_device) {
    return from_device ? (to_device ? "DtoD" : "DtoH") : (to_device ? "HtoD" : "HtoH");
}

// rows of `bytes` each. Copies what is there, whatever the caller calls it, but a wrong name is an error as in CUDA.
Error copy(const char* call, void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t bytes, size_t rows,
           CopyKind kind, Stream stream, bool waits) {
    if (!bytes || !rows) return SUCCESS;
    const Place target = place(to, to_pitch * (rows - 1) + bytes), source = place(from, from_pitch * (rows - 1) + bytes);
    const bool to_device = target.kind == DEVICE, from_device = source.kind == DEVICE;
    const bool pageable = target.kind == UNREGISTERED || source.kind == UNREGISTERED;
    write_down("copy", (std::string(name(from_device, to_device)) + (pageable ? " pageable" : "")).c_str(), bytes * rows);
    if (!target.fits || !source.fits) return refuse("a copy beyond the end of an allocation", INVALID_VALUE);
    if (kind != BY_ADDRESS && strcmp(name(kind == DEVICE_TO_HOST || kind == DEVICE_TO_DEVICE,
                                          kind == HOST_TO_DEVICE || kind == DEVICE_TO_DEVICE),
                                     name(from_device, to_device)))
        return refuse("a copy between other memories than it says", INVALID_VALUE);
    if (waits || (pageable && is_captured(stream))) {
        const std::string what = std::string(call) + (pageable ? " of pageable memory" : "");
        if (const Error error = refuse_during_capture(what.c_str())) return error;
    }
    return enqueue(call, stream, [=] {
        for (size_t row = 0; row < rows; ++row)
            memmove(target.reachable + row * to_pitch, source.reachable + row * from_pitch, bytes);
    });
}

Error fill(const char* call, void* to, int value, size_t bytes, Stream stream) {
    write_down("fill", call, bytes);
    const Place target = place(to, bytes);
    if (target.kind != DEVICE || !target.fits) return refuse("a fill of no device memory", INVALID_VALUE);
    return enqueue(call, stream, [=] { memset(target.reachable, value, bytes); });
}
}  // namespace

CUDA_API Error cudaMalloc(void** address, size_t bytes) {
    write_down("allocate", "cudaMalloc", bytes);
    if (const Error error = refuse_during_capture("cudaMalloc")) return error;
    return allocate(address, bytes);
}

// In the stream's order: allowed during a capture.
CUDA_API Error cudaMallocFromPoolAsync(void** address, size_t bytes, void*, Stream) {
    write_down("allocate", "cudaMallocFromPoolAsync", bytes);
    return allocate(address, bytes);
}

CUDA_API Error cudaFree(void* address) {
    if (address) {
        write_down("free", "cudaFree");
        if (const Error error = refuse_during_capture("cudaFree")) return error;
    }
    return release(address);
}

CUDA_API Error cudaFreeAsync(void* address, Stream stream) {
    // A captured one belongs to the graph, whose launches use the memory again.
    return is_captured(stream) ? SUCCESS : release(address);
}

CUDA_API Error cudaHostAlloc(void** address, size_t bytes, unsigned) {
    if (const Error error = refuse_during_capture("cudaHostAlloc")) return error;
    const size_t whole = (bytes + 511) / 512 * 512;
    *address = aligned_alloc(512, whole ? whole : 512);
    LOCKED;
    blocks[static_cast<char*>(*address)] = {whole ? whole : 512, nullptr};
    return SUCCESS;
}

CUDA_API Error cudaMallocHost(void** address, size_t bytes) { return cudaHostAlloc(address, bytes, 0); }

CUDA_API Error cudaFreeHost(void* address) { return release(address); }

CUDA_API Error cudaMemcpy(void* to, const void* from, size_t bytes, CopyKind kind) {
    return copy("cudaMemcpy", to, bytes, from, bytes, bytes, 1, kind, nullptr, true);
}

CUDA_API Error cudaMemcpyAsync(void* to, const void* from, size_t bytes, CopyKind kind, Stream stream) {
    return copy("cudaMemcpyAsync", to, bytes, from, bytes, bytes, 1, kind, stream, false);
}

CUDA_API Error cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t bytes,
                                 size_t rows, CopyKind kind, Stream stream) {
    return copy("cudaMemcpy2DAsync", to, to_pitch, from, from_pitch, bytes, rows, kind, stream, false);
}

// Variables of device code hold what a kernel wrote, which is nothing.
CUDA_API Error cudaMemcpyFromSymbol(void* to, const void*, size_t bytes, size_t, CopyKind) {
    write_down("copy", "DtoH pageable", bytes);
    if (const Error error = refuse_during_capture("cudaMemcpyFromSymbol")) return error;
    memset(to, 0, bytes);
    return SUCCESS;
}

CUDA_API Error cudaMemset(void* to, int value, size_t bytes) { return fill("cudaMemset", to, value, bytes, nullptr); }

CUDA_API Error cudaMemsetAsync(void* to, int value, size_t bytes, Stream stream) {
    return fill("cudaMemsetAsync", to, value, bytes, stream);
}

CUDA_API Error cudaMemGetInfo(size_t* free_bytes, size_t* all_bytes) {
    LOCKED;
    *all_bytes = device().memory_bytes;
    *free_bytes = *all_bytes - device_bytes;
    return SUCCESS;
}

CUDA_API Error cudaPointerGetAttributes(PointerAttributes* attributes, const void* address) {
    const Place found = place(address, 0);
    *attributes = PointerAttributes{};
    attributes->kind = found.kind;
    void* const plain = const_cast<void*>(address);
    attributes->device_pointer = found.kind == UNREGISTERED ? nullptr : plain;
    attributes->host_pointer = found.kind == DEVICE ? nullptr : plain;
    return SUCCESS;
}

CUDA_API Error cudaMemPoolCreate(void** pool, const void*) {
    *pool = new char;
    return SUCCESS;
}

CUDA_API Error cudaMemPoolDestroy(void* pool) {
    delete static_cast<char*>(pool);
    return SUCCESS;
}

CUDA_API Error cudaMemPoolGetAttribute(void*, int, void* value) {
    memset(value, 0, sizeof(uint64_t));
    return SUCCESS;
}

CUDA_API Error cudaMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }

CUDA_API Error cudaMemPoolTrimTo(void*, size_t) { return SUCCESS; }
