/* The bridge to ONNX Runtime: see op.h. */
#include "op.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "library.h"

#define CALL(api, entry, type) ((type)(uintptr_t)(api)->entries[entry])

typedef OrtStatus *(*CreateStatus)(int code, const char *text);
typedef void (*ReleaseStatus)(OrtStatus *);
typedef OrtStatus *(*GetInput)(const OrtKernelContext *, size_t, const OrtValue **);
typedef OrtStatus *(*GetCount)(const OrtKernelContext *, size_t *);
typedef OrtStatus *(*GetOutput)(OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **);
typedef OrtStatus *(*GetData)(OrtValue *, void **);
typedef OrtStatus *(*GetShape)(const OrtValue *, OrtShape **);
typedef OrtStatus *(*GetElementType)(const OrtShape *, int *);
typedef OrtStatus *(*GetRank)(const OrtShape *, size_t *);
typedef OrtStatus *(*GetDims)(const OrtShape *, int64_t *, size_t);
typedef void (*ReleaseShape)(OrtShape *);
typedef OrtStatus *(*ParallelFor)(const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *);
typedef OrtStatus *(*GetInt)(const OrtKernelInfo *, const char *, int64_t *);
typedef OrtStatus *(*GetFloat)(const OrtKernelInfo *, const char *, float *);
typedef OrtStatus *(*GetString)(const OrtKernelInfo *, const char *, char *, size_t *);

static int failed(const OrtApi *api, OrtStatus *status) {
    if (status == NULL) return 0;
    CALL(api, ORT_RELEASE_STATUS, ReleaseStatus)(status);
    return 1;
}

Tensor input_tensor(const void *state, OrtKernelContext *context, int index) {
    const OrtApi *api = ((const OpState *)state)->api;
    Tensor tensor = {0};
    const OrtValue *value = NULL;
    size_t given = 0;
    if (failed(api, CALL(api, ORT_KERNEL_CONTEXT_INPUT_COUNT, GetCount)(context, &given)) || (size_t)index >= given)
        return tensor;
    if (failed(api, CALL(api, ORT_KERNEL_CONTEXT_INPUT, GetInput)(context, (size_t)index, &value)) || value == NULL)
        return tensor;
    OrtShape *shape = NULL;
    size_t rank = 0;
    if (failed(api, CALL(api, ORT_GET_TENSOR_TYPE_AND_SHAPE, GetShape)(value, &shape))) return tensor;
    failed(api, CALL(api, ORT_GET_TENSOR_ELEMENT_TYPE, GetElementType)(shape, &tensor.type));
    failed(api, CALL(api, ORT_GET_DIMENSIONS_COUNT, GetRank)(shape, &rank));
    if (rank <= MOST_RANK) {
        failed(api, CALL(api, ORT_GET_DIMENSIONS, GetDims)(shape, tensor.dims, rank));
        failed(api, CALL(api, ORT_GET_TENSOR_MUTABLE_DATA, GetData)((OrtValue *)(uintptr_t)value, &tensor.data));
    }
    CALL(api, ORT_RELEASE_SHAPE, ReleaseShape)(shape);
    tensor.rank = (int)rank;
    tensor.size = 1;
    for (int axis = 0; axis < tensor.rank && axis < MOST_RANK; axis++) tensor.size *= tensor.dims[axis];
    return tensor;
}

void *output_data(const void *state, OrtKernelContext *context, int index, int rank, const int64_t *dims) {
    const OrtApi *api = ((const OpState *)state)->api;
    OrtValue *value = NULL;
    void *data = NULL;
    if (failed(api, CALL(api, ORT_KERNEL_CONTEXT_OUTPUT, GetOutput)(context, (size_t)index, dims, (size_t)rank, &value)) ||
        value == NULL)
        return NULL;
    failed(api, CALL(api, ORT_GET_TENSOR_MUTABLE_DATA, GetData)(value, &data));
    return data;
}

void parallel_for(const void *state, OrtKernelContext *context, void (*work)(void *, size_t), size_t total, void *data) {
    const OrtApi *api = ((const OpState *)state)->api;
    if (total == 0) return;
    /* As many batches as items: every item is claimed on its own, so that a thread which wakes late takes fewer. */
    if (total == 1 || failed(api, CALL(api, ORT_KERNEL_CONTEXT_PARALLEL_FOR, ParallelFor)(context, work, total, total, data)))
        for (size_t i = 0; i < total; i++) work(data, i);
}

int attribute_int(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *value) {
    return failed(api, CALL(api, ORT_KERNEL_INFO_INT64, GetInt)(info, name, value));
}

int attribute_float(const OrtApi *api, const OrtKernelInfo *info, const char *name, float *value) {
    return failed(api, CALL(api, ORT_KERNEL_INFO_FLOAT, GetFloat)(info, name, value));
}

int attribute_string(const OrtApi *api, const OrtKernelInfo *info, const char *name, char *text, size_t room) {
    return failed(api, CALL(api, ORT_KERNEL_INFO_STRING, GetString)(info, name, text, &room));
}

void *scratch(Scratch *block, size_t bytes) {
    if (block->bytes < bytes) {
        free(block->memory);
        size_t rounded = (bytes + 4095) / 4096 * 4096;
        block->memory = aligned_alloc(64, rounded);
        block->bytes = block->memory == NULL ? 0 : rounded;
    }
    return block->memory;
}

void release_scratch(Scratch *block) {
    free(block->memory);
    block->memory = NULL;
    block->bytes = 0;
}

uint64_t now_nanoseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* -- counters: one for each name, added to by whichever thread runs the operator -- */

#define MOST_COUNTERS 32
static struct {
    const char *name;
    atomic_uint_fast64_t calls, nanoseconds, bytes;
} counters[MOST_COUNTERS];

static int counter_of(const char *name) {
    for (int i = 0; i < MOST_COUNTERS && counters[i].name != NULL; i++)
        if (strcmp(counters[i].name, name) == 0) return i;
    return -1;
}

static void add_counter(const char *name) {
    int i = 0;
    if (counter_of(name) >= 0) return;
    while (i < MOST_COUNTERS && counters[i].name != NULL) i++;
    if (i < MOST_COUNTERS) counters[i].name = name;
}

void count_bytes(const Op *op, uint64_t bytes) {
    int i = counter_of(op->name);
    if (i >= 0) atomic_fetch_add_explicit(&counters[i].bytes, bytes, memory_order_relaxed);
}

void count_call(const Op *op, uint64_t nanoseconds, uint64_t bytes) {
    int i = counter_of(op->name);
    if (i < 0) return;
    atomic_fetch_add_explicit(&counters[i].calls, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&counters[i].nanoseconds, nanoseconds, memory_order_relaxed);
    atomic_fetch_add_explicit(&counters[i].bytes, bytes, memory_order_relaxed);
}

const char *cierzo_counter(int index, uint64_t values[3]) {
    if (index < 0 || index >= MOST_COUNTERS || counters[index].name == NULL) return NULL;
    values[0] = atomic_load(&counters[index].calls);
    values[1] = atomic_load(&counters[index].nanoseconds);
    values[2] = atomic_load(&counters[index].bytes);
    return counters[index].name;
}

/* -- the table of functions that ONNX Runtime calls -- */

static const Op *op_of(const OrtCustomOp *base) { return (const Op *)(const void *)base; }
static const char *get_name(const OrtCustomOp *base) { return op_of(base)->name; }
static const char *get_provider(const OrtCustomOp *base) { (void)base; return "CPUExecutionProvider"; }
static int get_input_type(const OrtCustomOp *base, size_t i) { return op_of(base)->input_types[i]; }
static size_t get_input_count(const OrtCustomOp *base) { return (size_t)op_of(base)->num_inputs; }
static int get_output_type(const OrtCustomOp *base, size_t i) { return op_of(base)->output_types[i]; }
static size_t get_output_count(const OrtCustomOp *base) { return (size_t)op_of(base)->num_outputs; }
static int get_input_kind(const OrtCustomOp *base, size_t i) {
    return (op_of(base)->optional_inputs >> i) & 1 ? OPTIONAL : REQUIRED;
}
static int get_output_kind(const OrtCustomOp *base, size_t i) { (void)base; (void)i; return REQUIRED; }
static int get_memory(const OrtCustomOp *base, size_t i) { (void)base; (void)i; return 0; }
static int get_one(const OrtCustomOp *base) { (void)base; return 1; }
static int get_latest(const OrtCustomOp *base) { (void)base; return INT32_MAX; }

static OrtStatus *create(const OrtCustomOp *base, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    const Op *op = op_of(base);
    OpState *state = calloc(1, op->state_bytes);
    if (state == NULL) return CALL(api, ORT_CREATE_STATUS, CreateStatus)(1, "out of memory");
    state->api = api;
    state->op = op;
    const char *fault = op->read(api, info, state);
    if (fault != NULL) {
        free(state);
        return CALL(api, ORT_CREATE_STATUS, CreateStatus)(1, fault);
    }
    *kernel = state;
    return NULL;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    OpState *state = kernel;
    uint64_t began = now_nanoseconds();
    const char *fault = state->op->run(state, context);
    count_call(state->op, now_nanoseconds() - began, 0);
    return fault == NULL ? NULL : CALL(state->api, ORT_CREATE_STATUS, CreateStatus)(1, fault);
}

static void destroy(void *kernel) {
    OpState *state = kernel;
    if (state->op->destroy_state != NULL) state->op->destroy_state(state);
    free(state);
}

void prepare(Op *op) {
    add_counter(op->name);
    op->base = (OrtCustomOp){
        .version = CIERZO_ORT_API_VERSION,
        .name = get_name,
        .provider = get_provider,
        .input_type = get_input_type,
        .input_count = get_input_count,
        .output_type = get_output_type,
        .output_count = get_output_count,
        .destroy = destroy,
        .input_characteristic = get_input_kind,
        .output_characteristic = get_output_kind,
        .input_memory = get_memory,
        .variadic_input_min = get_one,
        .variadic_input_homogeneity = get_one,
        .variadic_output_min = get_one,
        .variadic_output_homogeneity = get_one,
        .create_kernel_v2 = create,
        .compute_v2 = compute,
        .start_version = get_one,
        .end_version = get_latest,
    };
}
