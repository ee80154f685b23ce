/* RMSNorm: y = x / sqrt(mean(x^2) + epsilon) * weight over the last axis, float32. */
#include <math.h>

#include "isa.h"
#include "library.h"

typedef struct State {
    OpState head;
    float epsilon;
} State;

typedef struct Job {
    const float *x, *weight;
    float *y;
    int64_t rows, width, rows_at_once;
    float epsilon;
} Job;

enum { NUMBERS_AT_ONCE = 16384 }; /* about what a thread should take: waking one up costs more than a few rows */

static const char *read_attributes(const OrtApi *api, const OrtKernelInfo *info, void *memory) {
    State *state = memory;
    return attribute_float(api, info, "epsilon", &state->epsilon) ? "RMSNorm has no attribute epsilon" : NULL;
}

/* Sixteen partial sums, so that the compiler may keep them in one vector and rounding grows slowly. */
static inline __attribute__((always_inline)) void norm_row(const float *x, const float *weight, float *y,
                                                           int64_t width, float epsilon) {
    float sums[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= width; i += 16)
        for (int lane = 0; lane < 16; lane++) sums[lane] += x[i + lane] * x[i + lane];
    float total = 0;
    for (; i < width; i++) total += x[i] * x[i];
    for (int lane = 0; lane < 16; lane++) total += sums[lane];
    float inverse = 1.0f / sqrtf(total / (float)width + epsilon);
    for (i = 0; i < width; i++) y[i] = x[i] * inverse * weight[i];
}

typedef void (*NormRow)(const float *, const float *, float *, int64_t, float);

static void norm_row_portable(const float *x, const float *w, float *y, int64_t n, float e) { norm_row(x, w, y, n, e); }

#if defined(CIERZO_X86)
CIERZO_BEGIN_AVX2
static void norm_row_avx2(const float *x, const float *w, float *y, int64_t n, float e) { norm_row(x, w, y, n, e); }
CIERZO_END_ISA
CIERZO_BEGIN_AVX512
static void norm_row_avx512(const float *x, const float *w, float *y, int64_t n, float e) { norm_row(x, w, y, n, e); }
CIERZO_END_ISA
#endif

static NormRow chosen_row(void) {
#if defined(CIERZO_X86)
    if (isa_level() == ISA_AVX512) return norm_row_avx512;
    if (isa_level() == ISA_AVX2) return norm_row_avx2;
#endif
    return norm_row_portable;
}

static void work(void *data, size_t item) {
    const Job *job = data;
    NormRow row_of = chosen_row();
    int64_t first = (int64_t)item * job->rows_at_once, last = first + job->rows_at_once;
    for (int64_t row = first; row < (last < job->rows ? last : job->rows); row++)
        row_of(job->x + row * job->width, job->weight, job->y + row * job->width, job->width, job->epsilon);
}

static const char *run(void *memory, OrtKernelContext *context) {
    State *state = memory;
    Tensor x = input_tensor(state, context, 0), weight = input_tensor(state, context, 1);
    if (x.rank < 1 || x.rank > MOST_RANK || weight.rank != 1 || weight.dims[0] != x.dims[x.rank - 1])
        return "RMSNorm takes rows of a width and one weight of that width";
    Job job = {.x = x.data, .weight = weight.data, .epsilon = state->epsilon, .width = weight.dims[0]};
    job.y = output_data(state, context, 0, x.rank, x.dims);
    if (x.size == 0) return NULL;
    if (job.y == NULL) return "RMSNorm" NO_OUTPUT;
    job.rows = x.size / job.width;
    job.rows_at_once = job.width < NUMBERS_AT_ONCE ? NUMBERS_AT_ONCE / job.width : 1;
    parallel_for(state, context, work, (size_t)((job.rows + job.rows_at_once - 1) / job.rows_at_once), &job);
    return NULL;
}

Op rms_norm_op = {
    .name = "RMSNorm",
    .num_inputs = 2,
    .num_outputs = 1,
    .input_types = {TYPE_FLOAT, TYPE_FLOAT},
    .output_types = {TYPE_FLOAT},
    .state_bytes = sizeof(State),
    .read = read_attributes,
    .run = run,
};
