/* The part of RollingAttention that divides a checked call among threads. */
#ifndef CIERZO_ROLLING_ATTENTION_H
#define CIERZO_ROLLING_ATTENTION_H

#include "attention.h"
#include "op.h"

/* Writes all tokens to the rings and attends; NULL, or what is wrong. state: an OpState. */
const char *attend_all(void *state, OrtKernelContext *, const Attention *);

#endif
