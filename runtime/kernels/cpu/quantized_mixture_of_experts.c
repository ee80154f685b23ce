/* QuantizedMixtureOfExperts: as mixture_of_experts.c, with matrices of 4-bit or 8-bit numbers (quantized_matmul.h).
 *
 * A token's row is rounded once for an expert's gate and up, and the gated numbers once for its down. Only experts that
 * some token chose are read. */
#include "activation.h"
#include "expert_choice.h"
#include "library.h"
#include "quantized_matmul.h"
#include "shared_scratch.h"

typedef struct State {
    OpState head;
    Activation kind;
    int64_t bits, block;
} State;

/* Matrices of one kind, an expert's after the other's. first: expert 0's; the bytes of one expert's parts follow. */
typedef struct Stack {
    QuantizedWeight first;
    int64_t packed_bytes, scale_bytes, zero_bytes;
} Stack;

/* Experts that are worked on together: numbers `from` to `to - 1` of the choice. */
typedef struct Job {
    Activation kind;
    Choice choice;
    int64_t I, C, from, to;
    const float *x;
    Stack gate, up, down;
    float *results;
    char *memory; /* of expert i of the group from byte choice.where[i] on: see `Room` */
} Job;

/* Parts of an expert's memory, in bytes from its beginning: its tokens' rows rounded; what gate and up give, float32
 * [M, I] each; the gated numbers rounded. Each begins at a multiple of 64. */
typedef struct Room {
    int64_t gates, ups, hidden, bytes;
} Room;

enum { GROUP_BYTES = 8 << 20, SMALL_WORK = 16384, GATED_ROWS = 4 };

static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
static int64_t up_to_line(int64_t bytes) { return parts(bytes, 64) * 64; }

static Room room_of(const Job *job, int64_t M) {
    Room room = {.gates = up_to_line((int64_t)quantized_rows_bytes(M, &job->gate.first))};
    room.ups = room.gates + up_to_line(M * job->I * 4);
    room.hidden = room.ups + up_to_line(M * job->I * 4);
    room.bytes = room.hidden + up_to_line((int64_t)quantized_rows_bytes(M, &job->down.first));
    return room;
}

static QuantizedWeight matrix(const Job *job, const Stack *stack, int64_t chosen) {
    const int64_t expert = job->choice.expert[chosen];
    QuantizedWeight weight = stack->first;
    weight.packed += expert * stack->packed_bytes;
    weight.scale = (const char *)weight.scale + expert * stack->scale_bytes;
    if (weight.zero != NULL) weight.zero += expert * stack->zero_bytes;
    return weight;
}

/* One item of a stage: its number among its expert's items, the expert's tokens and its memory. */
typedef struct Place {
    int64_t chosen, item, M;
    Room room;
    char *memory;
} Place;

static Place placed(const Job *job, size_t item) {
    Place place = {.item = (int64_t)item};
    place.chosen = expert_of_item(&job->choice, job->from, &place.item);
    place.M = assignments_of(&job->choice, place.chosen);
    place.room = room_of(job, place.M);
    place.memory = job->memory + job->choice.where[place.chosen];
    return place;
}

/* -- the rows of x -- */

/* A single token's row is rounded for its first expert and used by all, unless one of them is asked twice: the row then
 * lies otherwise for that one. */
static int one_row(const Job *job) {
    return job->choice.N == 1 && job->choice.begin[job->choice.active] == job->choice.active;
}

static char *rounded_rows(const Job *job, const Place *place) {
    return one_row(job) ? job->memory + job->choice.where[job->from] : place->memory;
}

static int64_t items_of_rounding(const Job *job, int64_t chosen) {
    if (one_row(job) && chosen > job->from) return 0;
    return (int64_t)quantize_pieces(assignments_of(&job->choice, chosen), &job->gate.first);
}

static void round_item(void *data, size_t item) {
    const Job *job = data;
    const Place place = placed(job, item);
    quantize_rows(job->x, job->C, job->choice.token + job->choice.begin[place.chosen], place.M, &job->gate.first,
                  place.memory, (size_t)place.item);
}

/* -- gate and up: first the one's items, then the other's -- */

static int64_t items_of_gate(const Job *job, int64_t chosen) {
    return 2 * (int64_t)multiply_pieces(assignments_of(&job->choice, chosen), &job->gate.first);
}

static void gate_item(void *data, size_t item) {
    const Job *job = data;
    const Place place = placed(job, item);
    const int64_t pieces = job->choice.items[place.chosen] / 2;
    const int is_up = place.item >= pieces;
    const QuantizedWeight weight = matrix(job, is_up ? &job->up : &job->gate, place.chosen);
    float *y = (float *)(void *)(place.memory + (is_up ? place.room.ups : place.room.gates));
    multiply_rows(rounded_rows(job, &place), place.M, &weight, y, job->I, (size_t)(place.item - (is_up ? pieces : 0)));
}

/* -- the activation, in place of what gate gives -- */

static int64_t items_of_activation(const Job *job, int64_t chosen) {
    return parts(assignments_of(&job->choice, chosen), GATED_ROWS);
}

static void activation_item(void *data, size_t item) {
    const Job *job = data;
    const Place place = placed(job, item);
    const int64_t first = place.item * GATED_ROWS * job->I, rest = place.M * job->I - first;
    const int64_t count = rest < GATED_ROWS * job->I ? rest : GATED_ROWS * job->I;
    float *gates = (float *)(void *)(place.memory + place.room.gates) + first;
    const float *ups = (const float *)(void *)(place.memory + place.room.ups) + first;
    gated_activation(job->kind, gates, ups, gates, (size_t)count);
}

static int64_t items_of_hidden(const Job *job, int64_t chosen) {
    return (int64_t)quantize_pieces(assignments_of(&job->choice, chosen), &job->down.first);
}

static void hidden_item(void *data, size_t item) {
    const Job *job = data;
    const Place place = placed(job, item);
    quantize_rows((const float *)(void *)(place.memory + place.room.gates), job->I, NULL, place.M, &job->down.first,
                  place.memory + place.room.hidden, (size_t)place.item);
}

/* -- down -- */

static int64_t items_of_down(const Job *job, int64_t chosen) {
    return (int64_t)multiply_pieces(assignments_of(&job->choice, chosen), &job->down.first);
}

static void down_item(void *data, size_t item) {
    const Job *job = data;
    const Place place = placed(job, item);
    const QuantizedWeight down = matrix(job, &job->down, place.chosen);
    float *y = job->results + job->choice.begin[place.chosen] * job->C;
    multiply_rows(place.memory + place.room.hidden, place.M, &down, y, job->C, (size_t)place.item);
}

/* -- the whole -- */

/* The next experts to be worked on together, and the bytes that they take. */
static int64_t next_group(Job *job) {
    int64_t bytes = 0;
    for (job->to = job->from; job->to < job->choice.active; job->to++) {
        const int64_t more = room_of(job, assignments_of(&job->choice, job->to)).bytes;
        if (bytes > 0 && bytes + more > GROUP_BYTES && job->choice.N > 1) break;
        job->choice.where[job->to] = bytes;
        bytes += more;
    }
    return bytes;
}

/* numbers: how many the stage goes over; few of them are not worth waking a thread for. */
static void run_stage(const State *state, OrtKernelContext *context, Job *job, int64_t numbers,
                      int64_t (*items_of)(const Job *, int64_t chosen), void (*work)(void *, size_t)) {
    int64_t total = 0;
    for (int64_t chosen = job->from; chosen < job->to; chosen++)
        total += job->choice.items[chosen] = items_of(job, chosen);
    if (numbers > SMALL_WORK) parallel_for(state, context, work, (size_t)total, job);
    else
        for (int64_t item = 0; item < total; item++) work(job, (size_t)item);
}

static uint64_t expert_bytes(const Job *job) {
    uint64_t bytes = 0;
    const Stack *stacks[] = {&job->gate, &job->up, &job->down};
    for (int i = 0; i < 3; i++)
        bytes += (uint64_t)(stacks[i]->packed_bytes + stacks[i]->scale_bytes + stacks[i]->zero_bytes);
    return bytes;
}

static const char *run_experts(const State *state, OrtKernelContext *context, Job *job, const float *weight, float *y) {
    const Choice *choice = &job->choice;
    const int64_t results = up_to_line(choice->begin[choice->active] * job->C * 4);
    int64_t most = 0;
    for (job->from = 0; job->from < choice->active; job->from = job->to) {
        const int64_t bytes = next_group(job);
        most = bytes > most ? bytes : most;
    }
    Scratch *memory = borrow((size_t)(results + most + 64));
    if (memory == NULL) return "QuantizedMixtureOfExperts got no memory for the rows of its experts";
    job->results = memory->memory;
    job->memory = (char *)memory->memory + results;
    for (job->from = 0; job->from < choice->active; job->from = job->to) {
        next_group(job);
        const int64_t rows = choice->begin[job->to] - choice->begin[job->from], matrices = rows * job->I * job->C;
        run_stage(state, context, job, rows * job->C, items_of_rounding, round_item);
        run_stage(state, context, job, matrices / 16, items_of_gate, gate_item);
        run_stage(state, context, job, rows * job->I, items_of_activation, activation_item);
        run_stage(state, context, job, rows * job->I, items_of_hidden, hidden_item);
        run_stage(state, context, job, matrices / 16, items_of_down, down_item);
    }
    combine_experts(state, context, choice, weight, job->results, job->C, y);
    give_back(memory);
    count_bytes(state->head.op, (uint64_t)choice->active * expert_bytes(job));
    return NULL;
}

/* The stack of matrices [E, N, K] from packed [E, N, blocks, bytes], scale [E, N, blocks] and zero [E, N, bytes]. */
static const char *read_stack(const State *state, OrtKernelContext *context, int packed_at, int zero_at, int64_t K,
                              Stack *stack) {
    const Tensor packed = input_tensor(state, context, packed_at), scale = input_tensor(state, context, packed_at + 1);
    const Tensor zero = input_tensor(state, context, zero_at);
    QuantizedWeight *w = &stack->first;
    *w = (QuantizedWeight){packed.data, scale.data, zero.data, packed.dims[1], K, packed.dims[2], (int)state->bits,
                           (int)state->block, scale.type == TYPE_FLOAT16, LAYOUT_BY_NUMBER};
    const char *fault = quantized_weight_fault(w);
    if (fault != NULL) return fault;
    const int64_t E = packed.dims[0], zeros = parts(w->blocks * w->bits, 8);
    if (packed.rank != 4 || scale.rank != 3 || packed.dims[3] != w->block * w->bits / 8 || scale.dims[0] != E ||
        scale.dims[1] != w->N || scale.dims[2] != w->blocks)
        return "a stack of quantised experts has numbers [E, N, blocks, bytes] and scales [E, N, blocks]";
    if (w->zero != NULL && (zero.rank != 3 || zero.dims[0] != E || zero.dims[1] != w->N || zero.dims[2] != zeros))
        return "the zero points of a stack of quantised experts are [E, N, ceil(blocks * bits / 8)]";
    stack->packed_bytes = w->N * w->blocks * packed.dims[3];
    stack->scale_bytes = w->N * w->blocks * (w->scale_is_half ? 2 : 4);
    stack->zero_bytes = w->zero == NULL ? 0 : w->N * zeros;
    return NULL;
}

enum { FEW_TOKENS = 8 }; /* up to so many in a call, each expert's are multiplied row by row */

static const char *run(void *memory, OrtKernelContext *context) {
    const State *state = memory;
    Tensor x = input_tensor(state, context, 0), weight = input_tensor(state, context, 1);
    Tensor gate = input_tensor(state, context, 3), up = input_tensor(state, context, 5);
    Tensor down = input_tensor(state, context, 7);
    if (x.rank != 2 || gate.rank != 4 || up.rank != 4 || down.rank != 4 || up.dims[0] != gate.dims[0] ||
        up.dims[1] != gate.dims[1] || down.dims[0] != gate.dims[0] || down.dims[1] != x.dims[1])
        return "QuantizedMixtureOfExperts takes x [N, C], gate and up [E, I, blocks, bytes] and down [E, C, ...]";
    Job job = {.kind = state->kind, .C = x.dims[1], .I = gate.dims[1], .x = x.data};
    const char *fault = read_stack(state, context, 3, 9, job.C, &job.gate);
    if (fault == NULL) fault = read_stack(state, context, 5, 10, job.C, &job.up);
    if (fault == NULL) fault = read_stack(state, context, 7, 11, job.I, &job.down);
    if (fault != NULL) return fault;
    /* By all tokens of the call and not by those of each expert: a token's bits then do not depend on the others'. */
    const QuantizedLayout layout = x.dims[0] > FEW_TOKENS ? LAYOUT_BY_TOKENS : LAYOUT_BY_ROWS;
    job.gate.first.layout = job.up.first.layout = job.down.first.layout = layout;
    float *y = output_data(state, context, 0, 2, x.dims);
    if (x.size == 0) return NULL;
    if (y == NULL) return "QuantizedMixtureOfExperts" NO_OUTPUT;
    fault = choose_experts(weight, input_tensor(state, context, 2), x.dims[0], gate.dims[0], &job.choice);
    if (fault != NULL) return fault;
    fault = run_experts(state, context, &job, weight.data, y);
    forget_choice(&job.choice);
    return fault;
}

static const char *read_attributes(const OrtApi *api, const OrtKernelInfo *info, void *memory) {
    State *state = memory;
    if (attribute_activation(api, info, &state->kind))
        return "QuantizedMixtureOfExperts has no activation that its kernel knows";
    if (attribute_int(api, info, "bits", &state->bits) || attribute_int(api, info, "block_size", &state->block))
        return "QuantizedMixtureOfExperts needs the attributes bits and block_size";
    if (state->bits < 0 || state->bits > 8 || state->block < 0 || state->block > 1024)
        return "QuantizedMixtureOfExperts takes numbers of 4 or 8 bits in blocks of 16 to 256";
    scratch_users(1);
    return NULL;
}

#define OVERLOAD(type)                                                                                                \
    {                                                                                                                 \
        .name = "QuantizedMixtureOfExperts", .num_inputs = 12, .num_outputs = 1,                                      \
        .input_types = {TYPE_FLOAT, TYPE_FLOAT, TYPE_INT64, TYPE_UINT8, type, TYPE_UINT8, type, TYPE_UINT8, type,     \
                        TYPE_UINT8, TYPE_UINT8, TYPE_UINT8},                                                          \
        .output_types = {TYPE_FLOAT}, .optional_inputs = 7u << 9, .state_bytes = sizeof(State),                       \
        .read = read_attributes, .run = run, .destroy_state = leave_scratch,                                          \
    }

Op quantized_mixture_of_experts_op = OVERLOAD(TYPE_FLOAT);
Op quantized_mixture_of_experts_float16_op = OVERLOAD(TYPE_FLOAT16);
