/* What every operator of this library is written with: its declaration, its tensors, its threads, its counters. */
#ifndef CIERZO_OP_H
#define CIERZO_OP_H

#include "abi.h"

#define MOST_INPUTS 16
#define MOST_OUTPUTS 6
#define MOST_RANK 8

/* One operator under one combination of element types. Several with the same name and the same numbers of inputs and
 * outputs are overloads, and ONNX Runtime picks the one whose types fit. */
typedef struct Op {
    OrtCustomOp base; /* must come first: ONNX Runtime hands back a pointer to it */
    const char *name;
    int num_inputs, num_outputs;
    int input_types[MOST_INPUTS], output_types[MOST_OUTPUTS];
    uint32_t optional_inputs;              /* bit i: input i may be left out */
    size_t state_bytes;                    /* zeroed memory for the kernel's attributes, begins with an OpState */
    const char *(*read)(const OrtApi *, const OrtKernelInfo *, void *state); /* attributes; NULL, or what is wrong */
    const char *(*run)(void *state, OrtKernelContext *);                     /* one call; NULL, or what is wrong */
    void (*destroy_state)(void *state);    /* gives back what the state holds, if anything; NULL for nothing */
} Op;

/* The head of every kernel's state. */
typedef struct OpState {
    const OrtApi *api;
    const Op *op;
} OpState;

typedef struct Tensor {
    void *data; /* NULL where an optional input is left out */
    int rank, type;
    int64_t dims[MOST_RANK], size; /* size: number of elements */
} Tensor;

/* Fills in what ONNX Runtime calls; `op` must live as long as the process. Not while another thread uses the op. */
void prepare(Op *op);

Tensor input_tensor(const void *state, OrtKernelContext *, int index);
/* The output's memory, given its shape; NULL where there is none: then the call ends with <the op's name> NO_OUTPUT. */
#define NO_OUTPUT " could not get an output: no memory is left, or one of another shape is bound"
void *output_data(const void *state, OrtKernelContext *, int index, int rank, const int64_t *dims);

/* Calls work(data, i) for i = 0 ... total - 1 on ONNX Runtime's own threads, each i claimed by whoever is free. */
void parallel_for(const void *state, OrtKernelContext *, void (*work)(void *data, size_t i), size_t total, void *data);

int attribute_int(const OrtApi *, const OrtKernelInfo *, const char *name, int64_t *value);   /* 0 when it is there */
int attribute_float(const OrtApi *, const OrtKernelInfo *, const char *name, float *value);
int attribute_string(const OrtApi *, const OrtKernelInfo *, const char *name, char *text, size_t room);

/* Adds a call of `op` to what `cierzo_counter` reports. bytes: of weights or of KV that the call had to read. */
void count_call(const Op *op, uint64_t nanoseconds, uint64_t bytes);
uint64_t now_nanoseconds(void);
/* For an operator whose bytes are known only while it runs: adds to the call that is being counted. */
void count_bytes(const Op *op, uint64_t bytes);

/* Memory that lives from call to call: one block for each state, grown when needed, aligned to 64 bytes.
 * NULL when there is none left. Not shared between threads that run the same session at once. */
typedef struct Scratch {
    void *memory;
    size_t bytes;
} Scratch;
void *scratch(Scratch *, size_t bytes);
void release_scratch(Scratch *);

#endif
