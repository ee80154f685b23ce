/* The loops of float_matmul.h with vectors of four, which every machine's compiler knows. */
#include "float_matmul_isa.h"

#if defined(CIERZO_ARM)
enum { LANES = 4, ROWS = 4, SPAN = 1, FEW_SUMS = 16 }; /* 32 registers */
#else
enum { LANES = 4, ROWS = 2, SPAN = 1, FEW_SUMS = 8 };
#endif
typedef float Vector __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));

/* In whole numbers, so that it does not matter whether the thread takes denormal numbers for zeros. */
static inline Vector half_vector(const uint16_t *from) {
    const Bits half = {from[0], from[1], from[2], from[3]};
    const Bits sign = (half & 0x8000) << 16, rest = half & 0x7fff, bits = rest << 13;
    const Vector denormal = {(float)rest[0], (float)rest[1], (float)rest[2], (float)rest[3]};
    const Bits small = (Bits)(rest < 0x400), special = (Bits)(rest >= 0x7c00);
    Bits wide = bits + (112u << 23);                    /* from the one exponent's offset to the other's */
    wide += special & (112u << 23);                     /* infinities and what is no number have the largest */
    wide = (small & (Bits)(denormal * 0x1p-24f)) | (~small & wide);
    return (Vector)(wide | sign);
}

static inline float sum_lanes(Vector v) { return (v[0] + v[2]) + (v[1] + v[3]); }

static inline void transpose(const float *const *source, int64_t offset, float *target, int64_t stride) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) target[j * stride + i] = source[i][offset + j];
}

#include "float_matmul_kernel.h"

const FloatKernels float_kernels_portable = {few, pack, panels, unpack};
