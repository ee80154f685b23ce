// The journal: what was asked of the GPU, one line an event, in the file that CIERZO_CUDA_JOURNAL names.
#pragma once

#include "declarations.h"

#define SHARED_API extern "C" __attribute__((visibility("default")))

// kind: "launch", "copy", ...; what: the kernel's name, the copy's kind, ...; bytes, grid and block where there are any.
// Every event also says whether a capture was on.
void write_down(const char* kind, const char* what, size_t bytes = 0, Dim3 grid = {}, Dim3 block = {});

// What a real GPU refuses, or what would go wrong on one. Returns `error` and keeps it for cudaGetLastError.
Error refuse(const char* what, Error error);

// The same for the stand-ins of the other libraries, which are linked to this one.
SHARED_API void stand_in_write_down(const char* kind, const char* what);
SHARED_API void stand_in_write_down_product(const char* what, int m, int n, int k);

// Ends the process: an answer of our own making would be worse.
SHARED_API void stand_in_unknown(const char* call);
