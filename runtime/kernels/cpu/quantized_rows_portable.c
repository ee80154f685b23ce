/* The product in plain C, written so that a compiler can make vectors of it. */
#include <string.h>

#include "quantized_rows.h"

enum { TOKENS = 8 };

/* IEEE half precision to single: exact. */
static float single_of(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 1023u, bits;
    float value;
    if (exponent == 0) { /* zero or a denormal: the fraction counts units of 2^-24 */
        value = (float)fraction * 0x1p-24f;
        memcpy(&bits, &value, sizeof bits);
    } else {
        bits = (exponent == 31 ? 255u << 23 : (exponent + 112u) << 23) | fraction << 13;
    }
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float weight_scale(const QuantizedWeight *w, int64_t at) {
    return w->scale_is_half ? single_of(((const uint16_t *)w->scale)[at]) : ((const float *)w->scale)[at];
}

static int32_t weight_zero(const QuantizedWeight *w, int64_t n, int64_t b) {
    const uint8_t *zeros = w->zero + n * zero_stride(w);
    return w->bits == 8 ? zeros[b] : (zeros[b / 2] >> (b & 1) * 4) & 15;
}

void multiply_rows_portable(const Rows *rows, const QuantizedWeight *w, int64_t begin, int64_t end, float *y,
                            int64_t y_stride) {
    const int64_t bytes = (int64_t)w->block * w->bits / 8, stride = packed_stride(w);
    const int shift = zero_shift(w);
    for (int64_t n = begin; n < end; n++)
        for (int64_t m = 0; m < rows->M; m += TOKENS) {
            const int64_t tokens = rows->M - m < TOKENS ? rows->M - m : TOKENS;
            float sum[TOKENS] = {0};
            for (int64_t b = 0; b < w->blocks; b++) {
                uint8_t unpacked[SPAN];
                const uint8_t *packed = w->packed + n * stride + b * bytes, *numbers = packed;
                if (w->bits == 4) {
                    for (int64_t i = 0; i < bytes; i++) {
                        unpacked[2 * i] = packed[i] & 15;
                        unpacked[2 * i + 1] = packed[i] >> 4;
                    }
                    numbers = unpacked;
                }
                const float scale = weight_scale(w, n * w->blocks + b);
                for (int64_t t = 0; t < tokens; t++) {
                    const int8_t *x = rows->values + (m + t) * rows->width + b * w->block;
                    int32_t dot = rows->start[(m + t) * rows->starts + b];
                    if (w->zero != NULL) dot = dot / (1 << shift) * weight_zero(w, n, b);
                    for (int i = 0; i < w->block; i++) dot += (int32_t)x[i] * numbers[i];
                    sum[t] += (float)dot * (scale * rows->scale[(m + t) * rows->blocks + b]);
                }
            }
            for (int64_t t = 0; t < tokens; t++) y[(m + t) * y_stride + n] = sum[t];
        }
}
