// The activations of activations.cuh, so that a test can look at them alone.
#include "activations.cuh"

struct Values { const float* from; float* to; int count; };

CIERZO_KERNEL(activate, Values, 128) {
    for (int i = int(thread_x()); i < params.count; i += 128) params.to[i] = activation::GATED_BY(params.from[i]);
}
