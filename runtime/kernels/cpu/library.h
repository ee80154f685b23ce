/* What the shared library gives out. */
#ifndef CIERZO_LIBRARY_H
#define CIERZO_LIBRARY_H

#include "abi.h"
#include "op.h"

#if defined(_WIN32)
#define CIERZO_EXPORT __declspec(dllexport)
#else
#define CIERZO_EXPORT __attribute__((visibility("default")))
#endif

/* The entry that ONNX Runtime looks for: adds every operator to a session's options. */
CIERZO_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *, const OrtApiBase *);

/* Name of the instruction level in use: see isa.h. */
CIERZO_EXPORT const char *cierzo_isa(void);

/* Name of operator overload `index`, NULL past the last. */
CIERZO_EXPORT const char *cierzo_op(int index);

/* Name of counter `index`, NULL past the last; values: calls, nanoseconds, bytes of weights or of KV read. */
CIERZO_EXPORT const char *cierzo_counter(int index, uint64_t values[3]);

/* Multiplies and adds 8-bit numbers in registers, `rounds` times some; returns how many operations these were, 0 at a
 * level without instructions for it. */
CIERZO_EXPORT uint64_t cierzo_int8_operations(uint64_t rounds);

/* Quantises rows of weights: see quantizer.h. values [rows, columns] of the type `type` (QuantizerInput); packed
 * [rows, blocks, block * bits / 8]; scale [rows, blocks], float16 where half_scales, else float32; zero
 * [rows, ceil(blocks * bits / 8)], read only with zero_points. search: 0 nearest, else the search.
 * 0, the sum of what was found (quantizer.h: a weight that is not finite, which ends it, or a scale that its type cannot
 * hold), or -1 for sizes that no layout has. Rows are independent: threads may share them.
 */
CIERZO_EXPORT int cierzo_quantize_rows(const void *values, int type, int64_t rows, int64_t columns, int bits, int block,
                                       int zero_points, int half_scales, int search, uint8_t *packed, void *scale,
                                       uint8_t *zero);

/* The operators, each in a file of its own. */
extern Op gated_activation_op, rms_norm_op;
extern Op mixture_of_experts_op, mixture_of_experts_float16_op, mixture_of_experts_bfloat16_op;
extern Op quantized_matmul_op, quantized_matmul_float16_op;
extern Op quantized_mixture_of_experts_op, quantized_mixture_of_experts_float16_op;
extern Op stored_matmul_op, stored_matmul_float16_op, stored_matmul_bfloat16_op;
extern Op rolling_attention_float_op, rolling_attention_half_op, rolling_attention_int8_op;

#endif
