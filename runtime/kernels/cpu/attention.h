/* Grouped-query attention over rings of keys and values: one call, how it is divided, and the inner loops.
 *
 * B rows, T tokens of a step, H query heads on G heads of keys and values, D numbers a head, S slots of a ring.
 */
#ifndef CIERZO_ATTENTION_H
#define CIERZO_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

/* How a ring holds its numbers. RING_INT8: value = stored number * the slot's scale. */
typedef enum { RING_FLOAT, RING_HALF, RING_INT8 } RingKind;

enum {
    MOST_HEAD_DIM = 1024, /* a head's vector fits in a buffer on the stack */
    FEW_ROWS = 4,         /* FewQueries comes in fours */
    LANES = 64,           /* queries of one ManyQueries */
    BLOCK = 48,           /* keys that ManyQueries takes at once: with their scores they fit in the first-level cache */
    ROUNDED_BLOCK = 96,   /* keys taken at once where products are of bfloat16; even, as they lie in pairs */
    ROUNDED_TOKENS = 16,  /* tokens from which on a row is a chunk, whose products may be of bfloat16 */
    WIDEST = 16           /* numbers in the widest vector of any instruction level */
};

/* `count` consecutive slots of one head's rings. The scales are NULL unless the rings are int8. */
typedef struct Slots {
    RingKind kind;
    const void *key, *value;
    const float *key_scale, *value_scale;
    int64_t count;
} Slots;

/* The heads of one token on one KV head, on their way over its slots: softmax with a running maximum (Milakov and
 * Gimelshein 2018, arXiv:1805.02867). rows is a multiple of FEW_ROWS; width is D rounded up to WIDEST. */
typedef struct FewQueries {
    int64_t rows, D, width;
    float *query;           /* [rows, width], times the scale of the scores, zeros beyond D */
    float *attended;        /* [rows, width], not yet divided by `total` */
    float *greatest, *total; /* [rows], greatest score so far, sum of the weights relative to it */
} FewQueries;

/* Up to LANES queries of one KV head, side by side in vectors: heads of a token next to each other (Dao et al. 2022,
 * arXiv:2205.14135). Every row of LANES numbers is aligned to 64 bytes. */
typedef struct ManyQueries {
    int64_t lanes, D;        /* lanes: used ones, rounded up to WIDEST */
    float *query;            /* [D, LANES], times the scale of the scores */
    float *attended;         /* [D, LANES], not yet divided by `total` */
    float *score;            /* [BLOCK, LANES]; [ROUNDED_BLOCK, LANES] for RoundedLoops */
    float *greatest, *total; /* [LANES] */
} ManyQueries;

/* What is compiled once for every instruction level. */
typedef struct AttentionLoops {
    void (*attend_few)(const FewQueries *, const Slots *);
    /* At most BLOCK keys and values, float32 [count, D]. Lane i sees those from from[i] up to, without, to[i];
     * all of them where `from` is NULL. */
    void (*attend_many)(const ManyQueries *, const float *key, const float *value, int64_t count, const float *from,
                        const float *to);
    /* float32 [count, D] of what a ring holds; writes up to WIDEST numbers more than that. */
    void (*widen)(RingKind, const void *x, const float *scale, int64_t count, int64_t D, float *y);
    /* y[c * y_stride + r] = x[r * x_stride + c] */
    void (*transpose)(const float *x, int64_t x_stride, int64_t rows, int64_t columns, float *y, int64_t y_stride);
    void (*to_half)(const float *x, uint16_t *y, int64_t count); /* to nearest, ties to even */
    float (*to_int8)(const float *x, int8_t *y, int64_t count);  /* gives the scale, max|x| / 127 */
} AttentionLoops;

extern const AttentionLoops attention_loops_portable, attention_loops_avx2, attention_loops_avx512;

/* The same for chunks, with products of bfloat16: queries, keys, weights and values are rounded to it, to nearest, and
 * sums are float32. A pair is two bfloat16 in 32 bits, the first one lower. */
typedef struct RoundedLoops {
    /* The queries [D, LANES] become pairs [D/2, LANES] of two neighbouring numbers, in place. */
    void (*round_queries)(float *query, int64_t D);
    /* Keys [count, D] become pairs [count, D/2] of neighbouring numbers, values pairs [ceil(count/2), D] of two slots. */
    void (*round_slots)(const Slots *, int64_t D, uint32_t *key, uint32_t *value);
    /* attend_many of at most ROUNDED_BLOCK of them, for all LANES */
    void (*attend_many)(const ManyQueries *q, const uint32_t *key, const uint32_t *value, int64_t count, const float *from,
                        const float *to);
} RoundedLoops;

/* NULL where this machine has no such products, or its level of instructions was lowered. */
const RoundedLoops *rounded_loops(void);

/* One call of the operator, after its checks. Rings [B, G, S, D] already hold what they held before the call. */
typedef struct Attention {
    const AttentionLoops *loops;
    const RoundedLoops *rounded;     /* NULL: products are of float32 */
    int64_t B, T, H, G, D, S, group; /* group: H / G */
    int64_t window;                  /* 0: all */
    float scale;
    int interleaved;
    RingKind kind;
    const float *query, *key, *value, *cos, *sin; /* [B, T, H or G, D], [B, T, D/2] */
    const int64_t *start, *count;                 /* [B] */
    void *key_ring, *value_ring;
    float *key_scale, *value_scale;               /* [B, G, S] or NULL */
    float *attended;                              /* [B, T, H, D] */
} Attention;

static inline size_t ring_element(RingKind kind) { return kind == RING_FLOAT ? 4 : kind == RING_HALF ? 2 : 1; }

static inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

/* The first position that the token at `position` sees. */
static inline int64_t first_visible(const Attention *a, int64_t position) {
    return a->window == 0 || position < a->window ? 0 : position - a->window + 1;
}

/* The slots of consecutive positions from `position` on, up to `end` or the end of the ring. */
Slots slots_from(const Attention *, int64_t b, int64_t g, int64_t position, int64_t end);

/* y = x turned by the angles whose cosines and sines are given, [D/2] each. */
void rotate(const float *x, const float *cos, const float *sin, int64_t D, int interleaved, float *y);
/* Writes token t of row b to KV head g's slot. */
void write_token(const Attention *, int64_t b, int64_t g, int64_t t);
/* The rotated and scaled query of head h at token t. */
void rotated_query(const Attention *, int64_t b, int64_t h, int64_t t, float *y);

/* Decoding: a row with one token. Its slots are divided into parts that threads take independently. */
size_t part_floats(const Attention *);
/* Attends the slots of part `part` of `parts`, after writing the token if this part has its slot; memory: part_floats. */
void attend_part(const Attention *, int64_t b, int64_t g, int64_t part, int64_t parts, float *memory);
/* Adds up all parts, whose memories lie one after another, and gives the result out. */
void merge_parts(const Attention *, int64_t b, int64_t g, int64_t parts, float *memory);

/* Prefill: rows of several tokens, which must have been written. */
size_t block_floats(const Attention *);
/* Attends with rows `first` ... of the count[b] * group queries of KV head g, at most LANES. memory: block_floats. */
void attend_block(const Attention *, int64_t b, int64_t g, int64_t first, float *memory);

#endif
