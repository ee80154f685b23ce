/* How a call of RollingAttention is divided among threads.
 *
 * First, where there are several tokens, all of them are written. Then rows of one token go by KV head and part of the
 * slots that it sees, rows of several by KV head and block of queries. As many workers as there is work for take these
 * items one after another, so that memory is needed for each worker and not for each item.
 */
#include "rolling_attention.h"
#include "shared_scratch.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

enum {
    MOST_WORKERS = 64,
    PART_BYTES = 128 << 10,     /* of a ring that one item of decoding reads: some 15 microseconds */
    WORKER_NANOSECONDS = 10000, /* below this much work another thread is not worth its waking */
    WRITE_TOKENS = 32
};

typedef struct Row {
    int64_t first_item, parts; /* items of all rows before; items for each KV head */
    int64_t first_part;        /* parts of all rows before, where this row is one of decoding */
} Row;

typedef struct Division {
    const Attention *a;
    Row *rows;               /* [B] */
    atomic_int *unfinished;  /* [B, G], parts */
    float *part_memory, *worker_memory;
    size_t part_floats, worker_floats;
    int64_t items;
    atomic_llong next;
} Division;

static void write_tokens(void *data, size_t i) {
    const Attention *a = ((const Division *)data)->a;
    const int64_t pieces = (a->T + WRITE_TOKENS - 1) / WRITE_TOKENS, head = (int64_t)i / pieces;
    const int64_t b = head / a->G, g = head % a->G, begin = (int64_t)i % pieces * WRITE_TOKENS;
    for (int64_t t = begin; t < begin + WRITE_TOKENS && t < a->T; t++) {
        if (t < a->count[b]) {
            if (a->count[b] > 1) write_token(a, b, g, t); /* else attend_part does */
            continue;
        }
        float *padding = a->attended + ((b * a->T + t) * a->H + g * a->group) * a->D;
        memset(padding, 0, (size_t)(a->group * a->D) * sizeof *padding);
    }
}

static int64_t row_of(const Division *all, int64_t item) {
    int64_t low = 0, high = all->a->B - 1;
    while (low < high) { /* the last row that begins at or before the item */
        const int64_t middle = (low + high + 1) / 2;
        if (all->rows[middle].first_item <= item) low = middle;
        else high = middle - 1;
    }
    return low;
}

static void work(void *data, size_t worker) {
    Division *all = data;
    const Attention *a = all->a;
    float *memory = all->worker_memory + worker * all->worker_floats;
    for (int64_t item; (item = (int64_t)atomic_fetch_add_explicit(&all->next, 1, memory_order_relaxed)) < all->items;) {
        const int64_t b = row_of(all, item), in_row = item - all->rows[b].first_item, parts = all->rows[b].parts;
        const int64_t g = in_row / parts, part = in_row % parts;
        if (a->count[b] > 1) {
            attend_block(a, b, g, part * LANES, memory);
            continue;
        }
        float *head_memory = all->part_memory + (size_t)(all->rows[b].first_part + g * parts) * all->part_floats;
        attend_part(a, b, g, part, parts, head_memory + (size_t)part * all->part_floats);
        if (atomic_fetch_sub_explicit(&all->unfinished[b * a->G + g], 1, memory_order_acq_rel) == 1)
            merge_parts(a, b, g, parts, head_memory);
    }
}

/* Tokens that a row sees, from the first one of its first token on. */
static int64_t seen(const Attention *a, int64_t b) {
    return a->count[b] == 0 ? 0 : a->start[b] + a->count[b] - first_visible(a, a->start[b]);
}

static int64_t slot_bytes(const Attention *a) { return 2 * a->D * (int64_t)ring_element(a->kind); }

/* Items of row b for each KV head. */
static int64_t parts_of(const Attention *a, int64_t b) {
    const int64_t heads = a->B * a->G, most = heads < MOST_WORKERS ? MOST_WORKERS / heads : 1;
    if (a->count[b] != 1) return (a->count[b] * a->group + LANES - 1) / LANES;
    const int64_t parts = seen(a, b) * slot_bytes(a) / PART_BYTES;
    return parts < 1 ? 1 : parts > most ? most : parts;
}

/* About how long one thread is busy with row b. */
static double nanoseconds_of(const Attention *a, int64_t b) {
    const double pairs = (double)a->count[b] * (double)seen(a, b);
    if (a->count[b] > 1) return 0.04 * pairs * (double)(a->H * a->D); /* 100 operations each */
    return 0.125 * pairs * (double)(slot_bytes(a) * a->G);            /* 8 bytes each */
}

const char *attend_all(void *state, OrtKernelContext *context, const Attention *a) {
    const int64_t heads = a->B * a->G;
    if (heads == 0 || a->T == 0) return NULL;
    Division all = {.a = a, .part_floats = part_floats(a)};
    int64_t slots = 0, parts = 0, idle = 0;
    double nanoseconds = 0;
    for (int64_t b = 0; b < a->B; b++) {
        slots += seen(a, b) * a->G;
        all.items += parts_of(a, b) * a->G;
        if (a->count[b] == 1) parts += parts_of(a, b) * a->G;
        if (a->count[b] > 1) all.worker_floats = block_floats(a);
        idle += a->count[b] == 0;
        nanoseconds += nanoseconds_of(a, b);
    }
    count_bytes(((const OpState *)state)->op, (uint64_t)(slots * (slot_bytes(a) + (a->kind == RING_INT8 ? 8 : 0))));
    int64_t workers = (int64_t)fmin(nanoseconds / WORKER_NANOSECONDS, MOST_WORKERS);
    workers = workers > all.items ? all.items : workers;
    workers = workers < 1 ? 1 : workers;

    const size_t rows_bytes = (size_t)round_up(a->B * (int64_t)sizeof(Row), 64);
    const size_t unfinished_bytes = (size_t)round_up(heads * (int64_t)sizeof(atomic_int), 64);
    const size_t floats = (size_t)parts * all.part_floats + (size_t)workers * all.worker_floats;
    Scratch *block = borrow(rows_bytes + unfinished_bytes + floats * sizeof(float));
    if (block == NULL) return "RollingAttention found no memory left";
    char *memory = block->memory;
    all.rows = (Row *)(void *)memory;
    all.unfinished = (atomic_int *)(void *)(memory + rows_bytes);
    all.part_memory = (float *)(void *)(memory + rows_bytes + unfinished_bytes);
    all.worker_memory = all.part_memory + (size_t)parts * all.part_floats;
    Row next = {0, 0, 0};
    for (int64_t b = 0; b < a->B; b++) {
        next.parts = parts_of(a, b);
        all.rows[b] = next;
        next.first_item += next.parts * a->G;
        if (a->count[b] == 1) next.first_part += next.parts * a->G;
        for (int64_t g = 0; g < a->G; g++) atomic_init(&all.unfinished[b * a->G + g], (int)next.parts);
    }
    atomic_init(&all.next, 0);

    const size_t pieces = (size_t)(heads * ((a->T + WRITE_TOKENS - 1) / WRITE_TOKENS));
    if (a->T > WRITE_TOKENS / 4) parallel_for(state, context, write_tokens, pieces, &all);
    else if (a->T > 1 || idle > 0) for (size_t i = 0; i < pieces; i++) write_tokens(&all, i);
    parallel_for(state, context, work, (size_t)workers, &all);
    give_back(block);
    return NULL;
}
