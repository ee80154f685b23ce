#include "journal.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "capture.h"

namespace {
int journal_file() {
    static const int file = [] {
        const char* path = getenv("CIERZO_CUDA_JOURNAL");
        return path ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    }();
    return file;
}

std::string dims(Dim3 dim) {
    return std::to_string(dim.x) + "," + std::to_string(dim.y) + "," + std::to_string(dim.z);
}

thread_local Error last_error = SUCCESS;
}  // namespace

void write_down(const char* kind, const char* what, size_t bytes, Dim3 grid, Dim3 block) {
    if (journal_file() < 0) return;
    const std::string line = std::string(kind) + "\t" + what + "\t" + std::to_string(bytes) + "\t" + dims(grid) + "\t" +
                             dims(block) + "\t" + (capture_is_on() ? "1" : "0") + "\n";
    // One write to a file opened for appending: lines of several threads do not mix, and a crash loses none.
    if (write(journal_file(), line.data(), line.size()) < 0) abort();
}

Error refuse(const char* what, Error error) {
    write_down("violation", what);
    return last_error = error;
}

SHARED_API void stand_in_write_down(const char* kind, const char* what) { write_down(kind, what); }

SHARED_API void stand_in_write_down_product(const char* what, int m, int n, int k) {
    write_down("blas", what, 0, Dim3{unsigned(m), unsigned(n), unsigned(k)});
}

SHARED_API void stand_in_unknown(const char* call) {
    write_down("violation", (std::string(call) + " is unknown to the stand-in").c_str());
    fprintf(stderr, "The stand-in for CUDA does not know %s: write it in tests/support/cuda_stand_in.\n", call);
    abort();
}

CUDA_API Error cudaGetLastError() {
    const Error error = last_error;
    last_error = SUCCESS;
    return error;
}

CUDA_API Error cudaPeekAtLastError() { return last_error; }

CUDA_API const char* cudaGetErrorName(Error error) {
    switch (error) {
        case SUCCESS: return "cudaSuccess";
        case INVALID_VALUE: return "cudaErrorInvalidValue";
        case OUT_OF_MEMORY: return "cudaErrorMemoryAllocation";
        case NO_DEVICE: return "cudaErrorNoDevice";
        case CAPTURE_UNSUPPORTED: return "cudaErrorStreamCaptureUnsupported";
        case CAPTURE_INVALIDATED: return "cudaErrorStreamCaptureInvalidated";
        case CAPTURE_UNMATCHED: return "cudaErrorStreamCaptureUnmatched";
        case CAPTURE_IMPLICIT: return "cudaErrorStreamCaptureImplicit";
        default: return "cudaErrorUnknown";
    }
}

CUDA_API const char* cudaGetErrorString(Error error) {
    switch (error) {
        case SUCCESS: return "no error";
        case INVALID_VALUE: return "invalid argument";
        case OUT_OF_MEMORY: return "out of memory";
        case NO_DEVICE: return "no CUDA-capable device is detected";
        case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
        case CAPTURE_INVALIDATED: return "operation failed due to a previous error during capture";
        case CAPTURE_UNMATCHED: return "capture was not initiated in this stream";
        case CAPTURE_IMPLICIT: return "operation would make the legacy stream depend on a capturing blocking stream";
        default: return "unknown error";
    }
}
