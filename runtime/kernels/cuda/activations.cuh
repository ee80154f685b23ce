// The activations of gated layers, by the names that the operators' attribute has; the definition `GATED_BY` picks one.
//
// silu, gelu: Hendrycks and Gimpel 2016, arXiv:1606.08415; quick_gelu: the same paper's x·σ(1.702x); relu2: So et al.
// 2021, arXiv:2109.08668. All in float32, NaN in gives NaN out, relative errors of a few units in the last place except
// where exp's argument is large, which costs that many units.
#pragma once
#include "device.cuh"

DEVICE float exp_fast(float x) { return exp2_fast(x * 1.4426950408889634f); }
DEVICE float logistic(float x) { return reciprocal(1.0f + exp_fast(-x)); }

// For x >= 0 within 1.2e-7 of the value itself, which a difference from 1 would not be: Chebyshev fit of
// log(erfc(x)·(1 + x/2)) + x² in t = 1 / (1 + x/2) (Press et al., Numerical Recipes, "erfcc").
DEVICE float complementary_error(float x) {
    const float t = reciprocal(multiply_add(0.5f, x, 1.0f));
    float p = 0.17087277f;
    p = multiply_add(p, t, -0.82215223f);
    p = multiply_add(p, t, 1.48851587f);
    p = multiply_add(p, t, -1.13520398f);
    p = multiply_add(p, t, 0.27886807f);
    p = multiply_add(p, t, -0.18628806f);
    p = multiply_add(p, t, 0.09678418f);
    p = multiply_add(p, t, 0.37409196f);
    p = multiply_add(p, t, 1.00002368f);
    p = multiply_add(p, t, -1.26551223f);
    return t * exp_fast(multiply_add(-x, x, p));
}

namespace activation {
DEVICE float sigmoid(float x) { return logistic(x); }
DEVICE float silu(float x) { return x * logistic(x); }
DEVICE float quick_gelu(float x) { return x * logistic(1.702f * x); }
DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }
DEVICE float relu2(float x) { return relu(x) * relu(x); }
DEVICE float gelu(float x) {
    const float size = x < 0.0f ? -x : x;
    const float tail = complementary_error(0.70710678118654752f * size);  // twice the chance of being further out
    // As multiply_add, lest a compiler merges the tail's own product into the difference, here and not there.
    return 0.5f * x * (x < 0.0f ? tail : multiply_add(-1.0f, tail, 2.0f));
}
// (1 + tanh(u)) / 2 is the logistic function of 2u.
DEVICE float gelu_tanh(float x) {
    return x * logistic(1.5957691216057308f * multiply_add(0.044715f * x * x, x, x));
}
// 1 - 2 / (1 + exp(2x)) loses the digits of small x, where seven terms of the series do.
DEVICE float tanh(float x) {
    const float s = x * x;
    float series = 21844.0f / 6081075;
    series = multiply_add(series, s, -1382.0f / 155925);
    series = multiply_add(series, s, 62.0f / 2835);
    series = multiply_add(series, s, -17.0f / 315);
    series = multiply_add(series, s, 2.0f / 15);
    series = multiply_add(series, s, -1.0f / 3);
    series = multiply_add(series, s, 1.0f);
    return s < 0.25f ? x * series : multiply_add(-2.0f, logistic(-2.0f * x), 1.0f);
}
}  // namespace activation
