/* One set of loops for each instruction level: see float_matmul_kernel.h. */
#ifndef CIERZO_FLOAT_MATMUL_ISA_H
#define CIERZO_FLOAT_MATMUL_ISA_H

#include <string.h>

#include "abi.h"
#include "float_matmul.h"
#include "isa.h"
#include "unroll.h"

/* The functions of float_matmul.h that are named alike. */
typedef struct FloatKernels {
    void (*few)(const float *const *rows, int M, const StoredWeight *, int64_t first, int64_t count, float *y,
                int64_t y_stride);
    void (*pack)(const float *const *rows, int count, int64_t K, float *panel);
    void (*panels)(const float *packed, int panels, const StoredWeight *, int64_t first, int count, float *sums);
    void (*unpack)(const float *sums, int64_t M, int count, float *y, int64_t y_stride);
} FloatKernels;

extern const FloatKernels float_kernels_portable;
#if defined(CIERZO_X86)
extern const FloatKernels float_kernels_avx2, float_kernels_avx512;
#endif

#endif
