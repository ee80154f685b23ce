// cuBLASLt: as cublas.cpp. Layouts keep their rows and columns, so that a product's m, n and k can be written down.

#include <cstring>

#include "journal.h"

namespace {
struct Layout {
    uint64_t rows, columns;
};

constexpr size_t HEURISTIC_RESULT_BYTES = 96;  // sizeof(cublasLtMatmulHeuristicResult_t)

int create(void** handle) {
    *handle = new char;
    return 0;
}

int destroy(void* handle) {
    delete static_cast<char*>(handle);
    return 0;
}
}  // namespace

#define HANDLE(kind)                                                    \
    CUDA_API int cublasLt##kind##Create(void** handle) { return create(handle); } \
    CUDA_API int cublasLt##kind##Destroy(void* handle) { return destroy(handle); }

HANDLE()
HANDLE(MatmulDesc)
HANDLE(MatmulPreference)
HANDLE(MatrixTransformDesc)

#define SETTING(call) \
    CUDA_API int call() { return 0; }

SETTING(cublasLtMatmulAlgoConfigSetAttribute)
SETTING(cublasLtMatmulAlgoInit)
SETTING(cublasLtMatmulDescSetAttribute)
SETTING(cublasLtMatmulPreferenceSetAttribute)
SETTING(cublasLtMatrixLayoutSetAttribute)

CUDA_API int cublasLtMatrixLayoutCreate(void** layout, int, uint64_t rows, uint64_t columns, int64_t) {
    *layout = new Layout{rows, columns};
    return 0;
}

CUDA_API int cublasLtMatrixLayoutDestroy(void* layout) {
    delete static_cast<Layout*>(layout);
    return 0;
}

// One algorithm, which needs no workspace.
CUDA_API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results,
                                            int* found) {
    memset(results, 0, HEURISTIC_RESULT_BYTES);
    *found = 1;
    return 0;
}

CUDA_API int cublasLtMatmul(void*, void*, const void*, const void*, const Layout* a, const void*, const Layout* b,
                            const void*, const void*, const Layout*, void*, const Layout* d) {
    // Whether a is transposed is in the description: k is what a has beside m.
    const int m = int(d->rows), n = int(d->columns), k = int(a->rows == d->rows ? a->columns : a->rows);
    (void)b;
    stand_in_write_down_product("cublasLtMatmul", m, n, k);
    return 0;
}

CUDA_API int cublasLtMatrixTransform() {
    stand_in_write_down("blas", "cublasLtMatrixTransform");
    return 0;
}
