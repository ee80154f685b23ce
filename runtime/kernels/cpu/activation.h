/* The gated units' activations, one row at a time: y = act(gate) * up. */
#ifndef CIERZO_ACTIVATION_H
#define CIERZO_ACTIVATION_H

#include "op.h"

/* In the order of ACTIVATION_NAMES in activation.c. */
typedef enum { SILU, GELU, GELU_TANH, QUICK_GELU, RELU, RELU2, SIGMOID, TANH, NUM_ACTIVATIONS } Activation;

/* The activation that a node's attribute names; 0 when it is there and known. */
int attribute_activation(const OrtApi *, const OrtKernelInfo *, Activation *);

/* y[i] = act(gate[i]) * up[i]; y may be gate or up. */
void gated_activation(Activation, const float *gate, const float *up, float *y, size_t count);

#endif
