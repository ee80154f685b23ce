#include "activation.h"

#include <math.h>
#include <string.h>

#include "isa.h"

static const char *const ACTIVATION_NAMES[NUM_ACTIVATIONS] = {
    "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh",
};

int attribute_activation(const OrtApi *api, const OrtKernelInfo *info, Activation *kind) {
    char name[32] = {0};
    if (attribute_string(api, info, "activation", name, sizeof name)) return -1;
    for (int i = 0; i < NUM_ACTIVATIONS; i++)
        if (strcmp(name, ACTIVATION_NAMES[i]) == 0) {
            *kind = (Activation)i;
            return 0;
        }
    return -1;
}

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

static float activated(Activation kind, float x) {
    switch (kind) {
    case SILU: return x * sigmoid(x);
    case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case QUICK_GELU: return x * sigmoid(1.702f * x);
    case RELU: return x < 0 ? 0.0f : x; /* keeps a NaN */
    case RELU2: return x < 0 ? 0.0f : x * x;
    case SIGMOID: return sigmoid(x);
    default: return tanhf(x);
    }
}

#if defined(CIERZO_X86)
#include <immintrin.h>

CIERZO_BEGIN_AVX512
#include "exp_avx512.h"
static size_t silu_avx512(const float *gate, const float *up, float *y, size_t count) {
    const __m512 one = _mm512_set1_ps(1.0f);
    size_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m512 x = _mm512_loadu_ps(gate + i);
        __m512 denominator = _mm512_add_ps(one, exp_avx512(_mm512_sub_ps(_mm512_setzero_ps(), x)));
        _mm512_storeu_ps(y + i, _mm512_mul_ps(_mm512_div_ps(x, denominator), _mm512_loadu_ps(up + i)));
    }
    return i;
}
CIERZO_END_ISA

CIERZO_BEGIN_AVX2
#include "exp_avx2.h"
static size_t silu_avx2(const float *gate, const float *up, float *y, size_t count) {
    const __m256 one = _mm256_set1_ps(1.0f);
    size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256 x = _mm256_loadu_ps(gate + i);
        __m256 denominator = _mm256_add_ps(one, exp_avx2(_mm256_sub_ps(_mm256_setzero_ps(), x)));
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_div_ps(x, denominator), _mm256_loadu_ps(up + i)));
    }
    return i;
}
CIERZO_END_ISA
#endif

void gated_activation(Activation kind, const float *gate, const float *up, float *y, size_t count) {
    size_t done = 0;
#if defined(CIERZO_X86)
    if (kind == SILU && isa_level() == ISA_AVX512) done = silu_avx512(gate, up, y, count);
    else if (kind == SILU && isa_level() == ISA_AVX2) done = silu_avx2(gate, up, y, count);
#endif
    for (; done < count; done++) y[done] = activated(kind, gate[done]) * up[done];
}
