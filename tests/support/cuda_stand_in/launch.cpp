// Kernels: registered by name when the provider is loaded, written down when launched, and never run.

#include <cxxabi.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "capture.h"
#include "device.h"
#include "journal.h"

namespace {
std::mutex guard;
#define LOCKED const std::lock_guard<std::mutex> locked(guard)

// Made at the first use: kernels are registered before this library's own variables may be ready.
std::map<const void*, std::string>& mangled_names() {
    static std::map<const void*, std::string> names;
    return names;
}

std::string demangled(const void* function) {
    LOCKED;
    const auto found = mangled_names().find(function);
    if (found == mangled_names().end()) return "?";
    int status = 0;
    char* const readable = abi::__cxa_demangle(found->second.c_str(), nullptr, nullptr, &status);
    const std::string name = status == 0 ? readable : found->second;
    free(readable);
    return name;
}

constexpr size_t SHOWN_BYTES = 384;  // of an argument; the structures asked for are larger

// Writes down the first argument of kernels whose names hold the text in CIERZO_CUDA_ARGUMENTS, as hexadecimal digits.
void show_argument(const std::string& name, void** arguments) {
    const char* const wanted = getenv("CIERZO_CUDA_ARGUMENTS");
    if (!wanted || name.find(wanted) == std::string::npos) return;
    std::string digits;
    for (size_t at = 0; at < SHOWN_BYTES; ++at) {
        const unsigned char byte = static_cast<const unsigned char*>(arguments[0])[at];
        digits += "0123456789abcdef"[byte >> 4];
        digits += "0123456789abcdef"[byte & 15];
    }
    write_down("argument", digits.c_str());
}

Error launch(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared_bytes, Stream stream) {
    const std::string name = demangled(function);
    write_down("launch", name.c_str(), shared_bytes, grid, block);
    show_argument(name, arguments);
    if (shared_bytes > size_t(device().optin_shared_bytes)) return refuse("a launch with too much shared memory", INVALID_VALUE);
    if (!grid.x || !grid.y || !grid.z || !block.x || block.x * block.y * block.z > 1024)
        return refuse("a launch of no blocks, or of blocks with too many threads", INVALID_VALUE);
    return enqueue("a launch", stream, [] {});
}

thread_local struct {
    Dim3 grid, block;
    size_t shared_bytes;
    Stream stream;
} configuration;
}  // namespace

CUDA_API void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}

CUDA_API void __cudaRegisterFatBinaryEnd(void**) {}

CUDA_API void __cudaUnregisterFatBinary(void**) {}

CUDA_API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*,
                                     void*, int*) {
    LOCKED;
    mangled_names()[function] = name;
}

CUDA_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

CUDA_API unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes, Stream stream) {
    configuration = {grid, block, shared_bytes, stream};
    return 0;
}

CUDA_API Error __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared_bytes, Stream* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared_bytes = configuration.shared_bytes;
    *stream = configuration.stream;
    return SUCCESS;
}

CUDA_API Error __cudaGetKernel(const void** kernel, const void* function) {
    *kernel = function;
    return SUCCESS;
}

CUDA_API Error cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared_bytes, Stream stream) {
    return launch(function, grid, block, arguments, shared_bytes, stream);
}

CUDA_API Error __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared_bytes, Stream stream) {
    return launch(kernel, grid, block, arguments, shared_bytes, stream);
}

CUDA_API Error cudaLaunchCooperativeKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared_bytes,
                                           Stream stream) {
    return launch(function, grid, block, arguments, shared_bytes, stream);
}

CUDA_API Error cudaLaunchKernelExC(const LaunchConfig* config, const void* function, void** arguments) {
    return launch(function, config->grid, config->block, arguments, config->shared_bytes, config->stream);
}

CUDA_API Error cudaFuncGetAttributes(FunctionAttributes* attributes, const void*) {
    *attributes = FunctionAttributes{};
    attributes->max_threads = 1024;
    attributes->registers = 64;
    const char* const capability = device().capability;
    attributes->binary_version = attributes->ptx_version = atoi(capability) * 10 + atoi(strchr(capability, '.') + 1);
    attributes->max_dynamic_shared_bytes = device().optin_shared_bytes;
    return SUCCESS;
}

CUDA_API Error cudaFuncSetAttribute(const void*, int, int) { return SUCCESS; }

CUDA_API Error cudaKernelSetAttributeForDevice(const void*, int, int, int) { return SUCCESS; }

// Kernels that come as data and not as functions of the library: known by their names.

CUDA_API Error cudaLibraryLoadData(void** library, const void*, void*, void**, unsigned, void*, void**, unsigned) {
    *library = new char;
    return SUCCESS;
}

CUDA_API Error cudaLibraryGetKernel(const void** kernel, void*, const char* name) {
    *kernel = new char;
    LOCKED;
    mangled_names()[*kernel] = name;
    return SUCCESS;
}

CUDA_API Error cudaLibraryUnload(void* library) {
    delete static_cast<char*>(library);
    return SUCCESS;
}
