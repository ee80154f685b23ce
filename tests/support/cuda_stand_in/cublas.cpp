// cuBLAS: products are written down with their m, n and k, and nothing is computed.

#include <cstring>

#include "journal.h"

// A call that only has to succeed.
#define SETTING(call) \
    CUDA_API int call() { return 0; }

#define WRITTEN_DOWN(call)                 \
    CUDA_API int call() {                  \
        stand_in_write_down("blas", #call); \
        return 0;                          \
    }

// All of them begin with the handle, two transpositions, m, n and k.
#define PRODUCT(call)                                          \
    CUDA_API int call(void*, int, int, int m, int n, int k) {   \
        stand_in_write_down_product(#call, m, n, k);           \
        return 0;                                              \
    }

CUDA_API int cublasCreate_v2(void** handle) {
    *handle = new char;
    return 0;
}

CUDA_API int cublasDestroy_v2(void* handle) {
    delete static_cast<char*>(handle);
    return 0;
}

CUDA_API int cublasGetMathMode(void*, int* mode) {
    *mode = 0;
    return 0;
}

CUDA_API const char* cublasGetStatusName(int) { return "a cuBLAS status"; }

CUDA_API const char* cublasGetStatusString(int) { return "a cuBLAS status"; }

SETTING(cublasSetMathMode)
SETTING(cublasSetStream_v2)

PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasDgemmBatched)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)

WRITTEN_DOWN(cublasSgeam)
WRITTEN_DOWN(cublasDgeam)
WRITTEN_DOWN(cublasScopy_v2)
WRITTEN_DOWN(cublasSscal_v2)
WRITTEN_DOWN(cublasSgetrfBatched)
WRITTEN_DOWN(cublasDgetrfBatched)
WRITTEN_DOWN(cublasSgetriBatched)
WRITTEN_DOWN(cublasDgetriBatched)
