/* Chooses the loops of float_matmul.h by instruction level. */
#include "float_matmul.h"

#include "abi.h"
#include "float_matmul_isa.h"

static const FloatKernels *kernels(void) {
#if defined(CIERZO_X86)
    if (isa_level() == ISA_AVX512) return &float_kernels_avx512;
    if (isa_level() == ISA_AVX2) return &float_kernels_avx2;
#endif
    return &float_kernels_portable;
}

size_t stored_bytes(int type) { return type == TYPE_FLOAT ? 4 : 2; }

int64_t few_block(const StoredWeight *weight) {
    /* 256 KiB: some 10 to 30 microseconds at the speed of memory. */
    int64_t bytes = weight->K * (int64_t)stored_bytes(weight->type), rows = (256 << 10) / (bytes + 1) / 4 * 4;
    return rows < 4 ? 4 : rows > FEW_BLOCK ? FEW_BLOCK : rows;
}

void multiply_few(const float *const *rows, int M, const StoredWeight *weight, int64_t first, int64_t count, float *y,
                  int64_t y_stride) {
    kernels()->few(rows, M, weight, first, count, y, y_stride);
}

void pack_panel(const float *const *rows, int count, int64_t K, float *panel) {
    kernels()->pack(rows, count, K, panel);
}

void multiply_panels(const float *packed, int panels, const StoredWeight *weight, int64_t first, int count,
                     float *sums) {
    kernels()->panels(packed, panels, weight, first, count, sums);
}

void unpack_sums(const float *sums, int64_t M, int count, float *y, int64_t y_stride) {
    kernels()->unpack(sums, M, count, y, y_stride);
}
