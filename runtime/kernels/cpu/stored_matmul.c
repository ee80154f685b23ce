/* StoredMatMul: x [..., K] float32 times the transpose of weight [N, K] of float32, float16 or bfloat16. */
#include "float_matmul.h"
#include "library.h"
#include "shared_scratch.h"

typedef struct Job {
    const float *x;
    float *packed, *y;
    StoredWeight weight;
    int64_t M;
    size_t blocks; /* of the weight's rows */
} Job;

static void few_item(void *data, size_t i) {
    const Job *job = data;
    const int64_t K = job->weight.K, N = job->weight.N, block = few_block(&job->weight), first = (int64_t)i * block;
    const float *rows[FEW_ROWS];
    for (int64_t m = 0; m < job->M; m++) rows[m] = job->x + m * K;
    multiply_few(rows, (int)job->M, &job->weight, first, N - first < block ? N - first : block, job->y + first, N);
}

static void pack_item(void *data, size_t i) {
    const Job *job = data;
    const int64_t K = job->weight.K, first = (int64_t)i * PANEL, rest = job->M - first;
    const float *rows[PANEL];
    const int count = rest < PANEL ? (int)rest : PANEL;
    for (int lane = 0; lane < count; lane++) rows[lane] = job->x + (first + lane) * K;
    pack_panel(rows, count, K, job->packed + first * K);
}

static void panel_item(void *data, size_t i) {
    const Job *job = data;
    const int64_t K = job->weight.K, N = job->weight.N;
    const int64_t first = (int64_t)(i % job->blocks) * BLOCK, m = (int64_t)(i / job->blocks) * MOST_PANELS * PANEL;
    const int64_t M = job->M - m < MOST_PANELS * PANEL ? job->M - m : MOST_PANELS * PANEL;
    const int count = N - first < BLOCK ? (int)(N - first) : BLOCK;
    float sums[MOST_PANELS * BLOCK * PANEL];
    multiply_panels(job->packed + m * K, (int)((M + PANEL - 1) / PANEL), &job->weight, first, count, sums);
    unpack_sums(sums, M, count, job->y + m * N + first, N);
}

static const char *run(void *memory, OrtKernelContext *context) {
    const OpState *state = memory;
    Tensor x = input_tensor(state, context, 0), weight = input_tensor(state, context, 1);
    if (x.rank < 1 || x.rank > MOST_RANK || weight.rank != 2 || x.dims[x.rank - 1] != weight.dims[1])
        return "StoredMatMul takes x [..., K] and a weight [N, K] of the same K";
    Job job = {.x = x.data, .weight = {weight.data, weight.dims[0], weight.dims[1], weight.type}};
    const int64_t N = job.weight.N, K = job.weight.K;
    int64_t dims[MOST_RANK];
    job.M = 1;
    for (int axis = 0; axis < x.rank; axis++) {
        dims[axis] = axis + 1 < x.rank ? x.dims[axis] : N;
        if (axis + 1 < x.rank) job.M *= x.dims[axis];
    }
    job.y = output_data(state, context, 0, x.rank, dims);
    if (job.M == 0 || N == 0) return NULL;
    if (job.y == NULL) return "StoredMatMul" NO_OUTPUT;
    if (job.M <= FEW_ROWS) {
        const int64_t block = few_block(&job.weight);
        parallel_for(state, context, few_item, (size_t)((N + block - 1) / block), &job);
    } else {
        const size_t panels = (size_t)(job.M + PANEL - 1) / PANEL;
        Scratch *borrowed = borrow((panels * PANEL * (size_t)K + 1) * sizeof *job.packed);
        if (borrowed == NULL) return "StoredMatMul got no memory for the packed rows of its input";
        job.packed = borrowed->memory;
        job.blocks = (size_t)(N + BLOCK - 1) / BLOCK;
        parallel_for(state, context, pack_item, panels, &job);
        parallel_for(state, context, panel_item, job.blocks * ((panels + MOST_PANELS - 1) / MOST_PANELS), &job);
        give_back(borrowed);
    }
    count_bytes(state->op, (uint64_t)(N * K) * stored_bytes(job.weight.type));
    return NULL;
}

static const char *read_attributes(const OrtApi *api, const OrtKernelInfo *info, void *memory) {
    (void)api, (void)info, (void)memory; /* it has none */
    scratch_users(1);
    return NULL;
}

#define OVERLOAD(type)                                                                                                \
    {                                                                                                                 \
        .name = "StoredMatMul", .num_inputs = 2, .num_outputs = 1, .input_types = {TYPE_FLOAT, type},                 \
        .output_types = {TYPE_FLOAT}, .state_bytes = sizeof(OpState),.read = read_attributes, .run = run,             \
        .destroy_state = leave_scratch,                                                                               \
    }

Op stored_matmul_op = OVERLOAD(TYPE_FLOAT);
Op stored_matmul_float16_op = OVERLOAD(TYPE_FLOAT16);
Op stored_matmul_bfloat16_op = OVERLOAD(TYPE_BFLOAT16);
