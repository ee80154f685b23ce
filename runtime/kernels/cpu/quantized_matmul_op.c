/* QuantizedMatMul: x [..., K] times the transpose of a matrix of 4-bit or 8-bit weights. */
#include "library.h"
#include "quantized_matmul.h"
#include "shared_scratch.h"

enum { X, PACKED, SCALE, ZERO, NUM_INPUTS };

typedef struct State {
    OpState head;
    int64_t K, N, bits, block;
} State;

typedef struct Job {
    QuantizedWeight weight;
    const float *x;
    float *y;
    void *rows;
    int64_t M;
} Job;

static const char *read_attributes(const OrtApi *api, const OrtKernelInfo *info, void *memory) {
    State *state = memory;
    if (attribute_int(api, info, "K", &state->K) || attribute_int(api, info, "N", &state->N) ||
        attribute_int(api, info, "bits", &state->bits) || attribute_int(api, info, "block_size", &state->block))
        return "QuantizedMatMul needs the attributes K, N, bits and block_size";
    if (state->bits < 4 || state->bits > 8) return "QuantizedMatMul multiplies weights of 4 or 8 bits";
    if (state->block < 1 || state->block > 4096) return "QuantizedMatMul takes blocks of 16 to 256 numbers";
    QuantizedWeight weight = {.N = state->N, .K = state->K, .bits = (int)state->bits, .block = (int)state->block};
    weight.blocks = (weight.K + weight.block - 1) / weight.block;
    const char *fault = quantized_weight_fault(&weight);
    if (fault == NULL) scratch_users(1);
    return fault;
}

static int has_shape(const Tensor *tensor, int rank, int64_t a, int64_t b, int64_t c) {
    return tensor->rank == rank && tensor->dims[0] == a && tensor->dims[1] == b && (rank == 2 || tensor->dims[2] == c);
}

static void round_piece(void *data, size_t i) {
    const Job *job = data;
    quantize_rows(job->x, job->weight.K, NULL, job->M, &job->weight, job->rows, i);
}

static void multiply_piece(void *data, size_t i) {
    const Job *job = data;
    multiply_rows(job->rows, job->M, &job->weight, job->y, job->weight.N, i);
}

static const char *run(void *memory, OrtKernelContext *context) {
    State *state = memory;
    Tensor x = input_tensor(state, context, X), packed = input_tensor(state, context, PACKED);
    Tensor scale = input_tensor(state, context, SCALE), zero = input_tensor(state, context, ZERO);
    QuantizedWeight w = {.packed = packed.data, .scale = scale.data, .zero = zero.data, .N = state->N, .K = state->K};
    w.bits = (int)state->bits;
    w.block = (int)state->block;
    w.blocks = (w.K + w.block - 1) / w.block;
    w.scale_is_half = scale.type == TYPE_FLOAT16;
    if (x.rank < 1 || x.rank > MOST_RANK || x.dims[x.rank - 1] != w.K)
        return "QuantizedMatMul needs activations whose last axis has K numbers";
    if (!has_shape(&packed, 3, w.N, w.blocks, (int64_t)w.block * w.bits / 8))
        return "QuantizedMatMul needs packed weights of the shape [N, blocks, block_size * bits / 8]";
    if (!has_shape(&scale, 2, w.N, w.blocks, 0)) return "QuantizedMatMul needs scales of the shape [N, blocks]";
    const int64_t zero_bytes = (w.blocks * w.bits + 7) / 8;
    if (zero.data != NULL && !has_shape(&zero, 2, w.N, zero_bytes, 0))
        return "QuantizedMatMul needs zeros of the shape [N, ceil(blocks * bits / 8)]";
    int64_t dims[MOST_RANK];
    for (int axis = 0; axis < x.rank; axis++) dims[axis] = x.dims[axis];
    dims[x.rank - 1] = w.N;
    float *y = output_data(state, context, 0, x.rank, dims);
    const int64_t M = x.size / w.K;
    if (M == 0 || w.N == 0) return NULL;
    if (y == NULL) return "QuantizedMatMul" NO_OUTPUT;
    Scratch *rows = borrow(quantized_rows_bytes(M, &w));
    if (rows == NULL) return "QuantizedMatMul found no memory for its rounded activations";
    Job job = {w, x.data, y, rows->memory, M};
    parallel_for(state, context, round_piece, quantize_pieces(M, &w), &job);
    parallel_for(state, context, multiply_piece, multiply_pieces(M, &w), &job);
    give_back(rows);
    uint64_t scale_bytes = (uint64_t)(w.N * w.blocks) * (w.scale_is_half ? 2 : 4);
    count_bytes(state->head.op, (uint64_t)packed.size + scale_bytes + (zero.data == NULL ? 0 : (uint64_t)zero.size));
    return NULL;
}

/* One overload for each type of scales. */
#define OVERLOAD(SCALE_TYPE)                                                                                          \
    {                                                                                                                 \
        .name = "QuantizedMatMul", .num_inputs = NUM_INPUTS, .num_outputs = 1,                                        \
        .input_types = {TYPE_FLOAT, TYPE_UINT8, SCALE_TYPE, TYPE_UINT8}, .output_types = {TYPE_FLOAT},                \
        .optional_inputs = 1u << ZERO, .state_bytes = sizeof(State), .read = read_attributes, .run = run,             \
        .destroy_state = leave_scratch,                                                                               \
    }

Op quantized_matmul_float16_op = OVERLOAD(TYPE_FLOAT16);
Op quantized_matmul_op = OVERLOAD(TYPE_FLOAT);
