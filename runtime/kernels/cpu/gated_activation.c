/* GatedActivation: act(gate) * up of two tensors of one shape, float32. */
#include "activation.h"
#include "library.h"

#include <string.h>

typedef struct State {
    OpState head;
    Activation kind;
} State;

typedef struct Job {
    Activation kind;
    const float *gate, *up;
    float *y;
    size_t count;
} Job;

enum { PIECE = 8192 }; /* elements that one thread takes at once: its three pieces lie in the first-level cache's neighbour */

static const char *read_attributes(const OrtApi *api, const OrtKernelInfo *info, void *memory) {
    State *state = memory;
    if (attribute_activation(api, info, &state->kind))
        return "GatedActivation has no activation that its kernel knows";
    return NULL;
}

static void work(void *data, size_t i) {
    const Job *job = data;
    size_t begin = i * PIECE, rest = job->count - begin;
    gated_activation(job->kind, job->gate + begin, job->up + begin, job->y + begin, rest < PIECE ? rest : PIECE);
}

static const char *run(void *memory, OrtKernelContext *context) {
    State *state = memory;
    Tensor gate = input_tensor(state, context, 0), up = input_tensor(state, context, 1);
    if (gate.rank > MOST_RANK || gate.rank != up.rank || memcmp(gate.dims, up.dims, sizeof gate.dims) != 0)
        return "GatedActivation takes two tensors of one shape";
    float *y = output_data(state, context, 0, gate.rank, gate.dims);
    if (gate.size == 0) return NULL;
    if (y == NULL) return "GatedActivation" NO_OUTPUT;
    Job job = {state->kind, gate.data, up.data, y, (size_t)gate.size};
    parallel_for(state, context, work, (job.count + PIECE - 1) / PIECE, &job);
    return NULL;
}

Op gated_activation_op = {
    .name = "GatedActivation",
    .num_inputs = 2,
    .num_outputs = 1,
    .input_types = {TYPE_FLOAT, TYPE_FLOAT},
    .output_types = {TYPE_FLOAT},
    .state_bytes = sizeof(State),
    .read = read_attributes,
    .run = run,
};
