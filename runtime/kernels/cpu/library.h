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

/* The operators, each in a file of its own. */
extern Op gated_activation_op;

#endif
