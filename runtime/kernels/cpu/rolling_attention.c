/* RollingAttention: rotary embedding of queries and keys, the ring's write, and attention within the window, in one. */
#include "attention.h"
#include "isa.h"
#include "library.h"
#include "rolling_attention.h"
#include "shared_scratch.h"

#include <string.h>

typedef struct State {
    OpState head;
    Attention attributes; /* window, scale, interleaved; the rest is of one call */
} State;

static const AttentionLoops *best_loops(void) {
#if defined(CIERZO_X86)
    if (isa_level() >= ISA_AVX512) return &attention_loops_avx512;
    if (isa_level() >= ISA_AVX2) return &attention_loops_avx2;
#endif
    return &attention_loops_portable;
}

static const char *read_attributes(const OrtApi *api, const OrtKernelInfo *info, void *memory) {
    Attention *a = &((State *)memory)->attributes;
    int64_t interleaved = 0, rounds = 0;
    if (attribute_float(api, info, "scale", &a->scale) || attribute_int(api, info, "window", &a->window) ||
        attribute_int(api, info, "interleaved", &interleaved))
        return "RollingAttention needs the attributes scale, window and interleaved";
    if (a->window < 0) return "RollingAttention takes a window of at least 1, or 0 for all tokens";
    attribute_int(api, info, "rounds", &rounds); /* absent in models that were made before there was a choice */
    if (rounds != 0 && rounds != 1) return "RollingAttention takes rounds of 0 or 1";
    a->interleaved = interleaved != 0;
    a->loops = best_loops();
    a->rounded = rounds != 0 ? rounded_loops() : NULL;
    scratch_users(1);
    return NULL;
}

static int is(const Tensor *x, int rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3) {
    const int64_t dims[4] = {d0, d1, d2, d3};
    return x->rank == rank && memcmp(x->dims, dims, (size_t)rank * sizeof *dims) == 0;
}

/* Inputs in the node's order; ring: its two rings, and their scales where they are int8. */
static const char *sized(Attention *a, const Tensor *in, const Tensor *ring, const Tensor *rows) {
    if (in[0].rank != 4 || in[1].rank != 4 || ring[0].rank != 4)
        return "RollingAttention takes query [B, T, H, D], key and value [B, T, G, D] and rings [B, G, S, D]";
    a->B = in[0].dims[0], a->T = in[0].dims[1], a->H = in[0].dims[2], a->D = in[0].dims[3];
    a->G = in[1].dims[2], a->S = ring[0].dims[2];
    if (!is(&in[1], 4, a->B, a->T, a->G, a->D) || !is(&in[2], 4, a->B, a->T, a->G, a->D))
        return "RollingAttention takes key and value [B, T, G, D] that agree with query [B, T, H, D]";
    if (a->D < 2 || a->D % 2 != 0 || a->D > MOST_HEAD_DIM)
        return "RollingAttention takes heads of an even number of elements, at most 1024";
    if (!is(&in[3], 3, a->B, a->T, a->D / 2, 0) || !is(&in[4], 3, a->B, a->T, a->D / 2, 0))
        return "RollingAttention takes cosines and sines [B, T, D/2]";
    if (a->G < 1 || a->H % a->G != 0) return "RollingAttention takes a number of query heads that is a multiple of the KV heads";
    if (!is(&ring[0], 4, a->B, a->G, a->S, a->D) || !is(&ring[1], 4, a->B, a->G, a->S, a->D))
        return "RollingAttention takes rings [B, G, S, D] that agree with key [B, T, G, D]";
    if (a->kind == RING_INT8 && (!is(&ring[2], 3, a->B, a->G, a->S, 0) || !is(&ring[3], 3, a->B, a->G, a->S, 0)))
        return "RollingAttentionInt8 takes scales [B, G, S] for each of its rings [B, G, S, D]";
    if (!is(&rows[0], 1, a->B, 0, 0, 0) || !is(&rows[1], 1, a->B, 0, 0, 0))
        return "RollingAttention takes start and count [B]";
    a->group = a->H / a->G;
    return NULL;
}

static const char *rows_fault(const Attention *a) {
    if (a->T > a->S) return "RollingAttention is given more tokens at once than its ring has slots; feed fewer at a time";
    for (int64_t b = 0; b < a->B; b++) {
        const int64_t start = a->start[b], count = a->count[b];
        if (start < 0 || start > INT64_MAX / 4) return "RollingAttention takes start positions from 0 to 2^61";
        if (count < 0 || count > a->T) return "RollingAttention takes counts from 0 to the number of tokens";
        if (count > 0 && start + count - first_visible(a, start) > a->S)
            return a->window == 0 ? "RollingAttention without a window needs a slot for every token of the text, and the "
                                    "text has become longer than the ring; start again with a larger context"
                                  : "RollingAttention needs window + tokens - 1 slots, else its first token would no longer "
                                    "find all that it sees; feed fewer tokens at a time or make the ring larger";
    }
    return NULL;
}

/* -- rings that were not bound in place are copied first -- */

typedef struct Copy {
    const char *from;
    char *to;
    size_t bytes;
} Copy;

enum { COPY_PIECE = 1 << 20 };

static void copy_piece(void *data, size_t i) {
    const Copy *copy = data;
    const size_t begin = i * COPY_PIECE, rest = copy->bytes - begin;
    memcpy(copy->to + begin, copy->from + begin, rest < COPY_PIECE ? rest : COPY_PIECE);
}

static void *present(State *state, OrtKernelContext *context, int output, const Tensor *past, size_t element) {
    void *to = output_data(state, context, output, past->rank, past->dims);
    Copy copy = {past->data, to, (size_t)past->size * element};
    if (to != NULL && to != past->data)
        parallel_for(state, context, copy_piece, (copy.bytes + COPY_PIECE - 1) / COPY_PIECE, &copy);
    return to;
}

static const char *run(State *state, OrtKernelContext *context, RingKind kind) {
    Attention a = state->attributes;
    Tensor in[5], ring[4], rows[2];
    const int rings = kind == RING_INT8 ? 4 : 2;
    a.kind = kind;
    for (int i = 0; i < 5; i++) in[i] = input_tensor(state, context, i);
    for (int i = 0; i < rings; i++) ring[i] = input_tensor(state, context, 5 + i);
    for (int i = 0; i < 2; i++) rows[i] = input_tensor(state, context, 5 + rings + i);
    const char *fault = sized(&a, in, ring, rows);
    if (fault != NULL) return fault;
    a.query = in[0].data, a.key = in[1].data, a.value = in[2].data, a.cos = in[3].data, a.sin = in[4].data;
    a.start = rows[0].data, a.count = rows[1].data;
    if ((fault = rows_fault(&a)) != NULL) return fault;
    a.attended = output_data(state, context, 0, 4, in[0].dims);
    a.key_ring = present(state, context, 1, &ring[0], ring_element(kind));
    a.value_ring = present(state, context, 2, &ring[1], ring_element(kind));
    if (kind == RING_INT8) {
        a.key_scale = present(state, context, 3, &ring[2], sizeof(float));
        a.value_scale = present(state, context, 4, &ring[3], sizeof(float));
    }
    const int scales_there = kind != RING_INT8 || (a.key_scale != NULL && a.value_scale != NULL);
    if ((in[0].size > 0 && a.attended == NULL) ||
        (ring[0].size > 0 && (a.key_ring == NULL || a.value_ring == NULL || !scales_there)))
        return "RollingAttention" NO_OUTPUT;
    return attend_all(state, context, &a);
}

static const char *run_float(void *state, OrtKernelContext *context) { return run(state, context, RING_FLOAT); }
static const char *run_half(void *state, OrtKernelContext *context) { return run(state, context, RING_HALF); }
static const char *run_int8(void *state, OrtKernelContext *context) { return run(state, context, RING_INT8); }

#define FLOATS TYPE_FLOAT, TYPE_FLOAT, TYPE_FLOAT, TYPE_FLOAT, TYPE_FLOAT
#define OVER_RINGS(type, function)                                                                                    \
    {.name = "RollingAttention", .num_inputs = 9, .num_outputs = 3,                                                   \
     .input_types = {FLOATS, type, type, TYPE_INT64, TYPE_INT64}, .output_types = {TYPE_FLOAT, type, type},           \
     .state_bytes = sizeof(State), .read = read_attributes, .run = function, .destroy_state = leave_scratch}

Op rolling_attention_float_op = OVER_RINGS(TYPE_FLOAT, run_float);
Op rolling_attention_half_op = OVER_RINGS(TYPE_FLOAT16, run_half);

Op rolling_attention_int8_op = {
    .name = "RollingAttentionInt8",
    .num_inputs = 11,
    .num_outputs = 5,
    .input_types = {FLOATS, TYPE_INT8, TYPE_INT8, TYPE_FLOAT, TYPE_FLOAT, TYPE_INT64, TYPE_INT64},
    .output_types = {TYPE_FLOAT, TYPE_INT8, TYPE_INT8, TYPE_FLOAT, TYPE_FLOAT},
    .state_bytes = sizeof(State),
    .read = read_attributes,
    .run = run_int8,
    .destroy_state = leave_scratch,
};
