/* MixtureOfExperts: the chosen gated units of each token, weighted and added; experts as float32, float16 or bfloat16.
 *
 * Only experts that some token chose are read. An expert with few tokens multiplies its rows as they lie (dot products
 * at the speed of memory); one with more has them packed into panels (float_matmul.h), and since the sums of a product
 * of panels lie as panels again, what gate and up give becomes the next product's panels with no further move.
 */
#include "activation.h"
#include "expert_choice.h"
#include "float_matmul.h"
#include "library.h"
#include "shared_scratch.h"

typedef struct State {
    OpState head;
    Activation kind;
} State;

/* Experts that are worked on together, so many as have their rows within the caches: numbers from `from` to `to - 1` of
 * the choice. */
typedef struct Job {
    Activation kind;
    Choice choice;
    int64_t E, I, C, from, to;
    int type, few_tokens; /* see few() */
    const float *x;
    const char *gate, *up, *down;
    float *results, *packed, *hidden; /* of expert i of the group from row choice.where[i] on in the last two */
} Job;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

/* Whether an expert's M rows are dot products. Decided by all tokens of the call and not by the expert's own, so that a
 * token's bits do not depend on which experts the others chose. */
static int few(const Job *job, int64_t M) { return job->few_tokens && M <= FEW_ROWS; }

/* Rows that an expert's tokens take in `packed` and `hidden`. */
static int64_t room_of(const Job *job, int64_t chosen) {
    int64_t M = assignments_of(&job->choice, chosen);
    return few(job, M) ? M : parts(M, PANEL) * PANEL;
}

static StoredWeight matrix(const Job *job, const char *stack, int64_t chosen, int64_t N, int64_t K) {
    const size_t before = (size_t)(job->choice.expert[chosen] * N * K);
    return (StoredWeight){stack + before * stored_bytes(job->type), N, K, job->type};
}

/* One item of a stage: its number among its expert's items, the expert's tokens and where their rows lie. */
typedef struct Place {
    int64_t chosen, item, M, row;
} Place;

static Place placed(const Job *job, size_t item) {
    Place place = {.item = (int64_t)item};
    place.chosen = expert_of_item(&job->choice, job->from, &place.item);
    place.M = assignments_of(&job->choice, place.chosen);
    place.row = job->choice.where[place.chosen];
    return place;
}

static void run_stage(const State *state, OrtKernelContext *context, Job *job,
                      int64_t (*items_of)(const Job *, int64_t M), void (*work)(void *, size_t)) {
    int64_t total = 0;
    for (int64_t chosen = job->from; chosen < job->to; chosen++)
        total += job->choice.items[chosen] = items_of(job, assignments_of(&job->choice, chosen));
    parallel_for(state, context, work, (size_t)total, job);
}

/* Items of a product with a matrix [N, K]: blocks of its rows, for panels times groups of panels. */
static int64_t items_of_product(const Job *job, int64_t M, int64_t N, int64_t K) {
    const StoredWeight weight = {NULL, N, K, job->type};
    if (few(job, M)) return parts(N, few_block(&weight));
    return parts(N, BLOCK) * parts(M, MOST_PANELS * PANEL);
}

/* -- the rows of x as panels -- */

static int64_t items_of_pack(const Job *job, int64_t M) {
    return few(job, M) ? 0 : parts(M, PANEL);
}

/* The rows of x that an expert's assignments `first` ... are made for, at most PANEL. */
static int rows_of(const Job *job, Place place, int64_t first, const float **rows) {
    const int count = (int)least(PANEL, place.M - first);
    const int64_t *token = job->choice.token + job->choice.begin[place.chosen] + first;
    for (int i = 0; i < count; i++) rows[i] = job->x + token[i] * job->C;
    return count;
}

static void pack_item(void *data, size_t item) {
    const Job *job = data;
    const Place place = placed(job, item);
    const float *rows[PANEL];
    int count = rows_of(job, place, place.item * PANEL, rows);
    pack_panel(rows, count, job->C, job->packed + (place.row + place.item * PANEL) * job->C);
}

/* -- gate, up and the activation -- */

static int64_t items_of_gate(const Job *job, int64_t M) { return items_of_product(job, M, job->I, job->C); }

static void few_gate(const Job *job, Place place, const StoredWeight *gate, const StoredWeight *up) {
    const int64_t I = job->I, block = few_block(gate), first = place.item * block, count = least(block, I - first);
    const float *rows[PANEL];
    float gates[FEW_ROWS * FEW_BLOCK], ups[FEW_ROWS * FEW_BLOCK];
    rows_of(job, place, 0, rows);
    multiply_few(rows, (int)place.M, gate, first, count, gates, FEW_BLOCK);
    multiply_few(rows, (int)place.M, up, first, count, ups, FEW_BLOCK);
    for (int64_t m = 0; m < place.M; m++)
        gated_activation(job->kind, gates + m * FEW_BLOCK, ups + m * FEW_BLOCK,
                         job->hidden + (place.row + m) * I + first, (size_t)count);
}

static void gate_item(void *data, size_t item) {
    const Job *job = data;
    const Place place = placed(job, item);
    const int64_t I = job->I, blocks = parts(I, BLOCK);
    const StoredWeight gate = matrix(job, job->gate, place.chosen, I, job->C);
    const StoredWeight up = matrix(job, job->up, place.chosen, I, job->C);
    if (few(job, place.M)) {
        few_gate(job, place, &gate, &up);
        return;
    }
    const int64_t first = place.item % blocks * BLOCK, m = place.item / blocks * MOST_PANELS * PANEL;
    const int count = (int)least(BLOCK, I - first), panels = (int)least(MOST_PANELS, parts(place.M - m, PANEL));
    const float *packed = job->packed + (place.row + m) * job->C;
    float gates[MOST_PANELS * BLOCK * PANEL], ups[MOST_PANELS * BLOCK * PANEL];
    multiply_panels(packed, panels, &gate, first, count, gates);
    multiply_panels(packed, panels, &up, first, count, ups);
    for (int p = 0; p < panels; p++)
        gated_activation(job->kind, gates + p * (BLOCK * PANEL), ups + p * (BLOCK * PANEL),
                         job->hidden + (place.row + m + p * PANEL) * I + first * PANEL, (size_t)count * PANEL);
}

/* -- down -- */

static int64_t items_of_down(const Job *job, int64_t M) { return items_of_product(job, M, job->C, job->I); }

static void down_item(void *data, size_t item) {
    const Job *job = data;
    const Place place = placed(job, item);
    const int64_t I = job->I, C = job->C, blocks = parts(C, BLOCK);
    const StoredWeight down = matrix(job, job->down, place.chosen, C, I);
    float *results = job->results + job->choice.begin[place.chosen] * C;
    if (few(job, place.M)) {
        const int64_t block = few_block(&down), first = place.item * block;
        const float *rows[FEW_ROWS];
        for (int64_t m = 0; m < place.M; m++) rows[m] = job->hidden + (place.row + m) * I;
        multiply_few(rows, (int)place.M, &down, first, least(block, C - first), results + first, C);
        return;
    }
    const int64_t first = place.item % blocks * BLOCK, m = place.item / blocks * MOST_PANELS * PANEL;
    const int64_t M = least(MOST_PANELS * PANEL, place.M - m);
    const int count = (int)least(BLOCK, C - first);
    float sums[MOST_PANELS * BLOCK * PANEL];
    multiply_panels(job->hidden + (place.row + m) * I, (int)parts(M, PANEL), &down, first, count, sums);
    unpack_sums(sums, M, count, results + m * C + first, C);
}

/* -- the whole -- */

enum { GROUP_BYTES = 8 << 20 }; /* of packed rows and hidden numbers that are held at once: a part of the last cache */

/* The next experts to be worked on together, and the rows that they take. */
static int64_t next_group(Job *job) {
    const int64_t row_bytes = (job->C + job->I) * (int64_t)sizeof(float);
    int64_t rows = 0;
    for (job->to = job->from; job->to < job->choice.active; job->to++) {
        const int64_t more = room_of(job, job->to);
        if (rows > 0 && (rows + more) * row_bytes > GROUP_BYTES) break;
        job->choice.where[job->to] = rows;
        rows += more;
    }
    return rows;
}

static const char *run_experts(const State *state, OrtKernelContext *context, Job *job, const float *weight, float *y) {
    const int64_t results = job->choice.begin[job->choice.active] * job->C, columns = job->C + job->I;
    int64_t most = 0;
    for (job->from = 0; job->from < job->choice.active; job->from = job->to) {
        const int64_t rows = next_group(job);
        most = rows > most ? rows : most;
    }
    Scratch *memory = borrow(sizeof(float) * (size_t)(results + most * columns + 1));
    if (memory == NULL) return "a mixture of experts got no memory for the rows of its experts";
    job->results = memory->memory;
    job->packed = job->results + results;
    for (job->from = 0; job->from < job->choice.active; job->from = job->to) {
        job->hidden = job->packed + next_group(job) * job->C;
        run_stage(state, context, job, items_of_pack, pack_item);
        run_stage(state, context, job, items_of_gate, gate_item);
        run_stage(state, context, job, items_of_down, down_item);
    }
    combine_experts(state, context, &job->choice, weight, job->results, job->C, y);
    give_back(memory);
    count_bytes(state->head.op, (uint64_t)(job->choice.active * 3 * job->I * job->C) * stored_bytes(job->type));
    return NULL;
}

static const char *run(void *memory, OrtKernelContext *context) {
    const State *state = memory;
    Tensor x = input_tensor(state, context, 0), weight = input_tensor(state, context, 1);
    Tensor gate = input_tensor(state, context, 3), up = input_tensor(state, context, 4);
    Tensor down = input_tensor(state, context, 5);
    if (x.rank != 2 || gate.rank != 3 || up.rank != 3 || down.rank != 3 || gate.dims[2] != x.dims[1] ||
        up.dims[0] != gate.dims[0] || up.dims[1] != gate.dims[1] || up.dims[2] != gate.dims[2] ||
        down.dims[0] != gate.dims[0] || down.dims[1] != gate.dims[2] || down.dims[2] != gate.dims[1])
        return "a mixture of experts takes x [N, C], gate and up [E, I, C] and down [E, C, I]";
    Job job = {.kind = state->kind, .E = gate.dims[0], .I = gate.dims[1], .C = gate.dims[2], .type = gate.type,
               .few_tokens = x.dims[0] <= FEW_ROWS, .x = x.data, .gate = gate.data, .up = up.data, .down = down.data};
    float *y = output_data(state, context, 0, 2, x.dims);
    if (x.size == 0) return NULL;
    if (y == NULL) return "a mixture of experts" NO_OUTPUT;
    const char *fault = choose_experts(weight, input_tensor(state, context, 2), x.dims[0], job.E, &job.choice);
    if (fault != NULL) return fault;
    fault = run_experts(state, context, &job, weight.data, y);
    forget_choice(&job.choice);
    return fault;
}

static const char *read_attributes(const OrtApi *api, const OrtKernelInfo *info, void *memory) {
    State *state = memory;
    if (attribute_activation(api, info, &state->kind))
        return "a mixture of experts has no activation that its kernel knows";
    scratch_users(1);
    return NULL;
}

#define OVERLOAD(type)                                                                                                \
    {                                                                                                                 \
        .name = "MixtureOfExperts", .num_inputs = 6, .num_outputs = 1,                                                \
        .input_types = {TYPE_FLOAT, TYPE_FLOAT, TYPE_INT64, type, type, type}, .output_types = {TYPE_FLOAT},          \
        .state_bytes = sizeof(State), .read = read_attributes, .run = run, .destroy_state = leave_scratch,            \
    }

Op mixture_of_experts_op = OVERLOAD(TYPE_FLOAT);
Op mixture_of_experts_float16_op = OVERLOAD(TYPE_FLOAT16);
Op mixture_of_experts_bfloat16_op = OVERLOAD(TYPE_BFLOAT16);
