/* Which tokens go to which expert, and the weighted sum of what the experts say, for the mixtures of experts. */
#ifndef CIERZO_EXPERT_CHOICE_H
#define CIERZO_EXPERT_CHOICE_H

#include "op.h"

/* A call's assignments of tokens to experts: those of one expert lie together, its tokens in their order. An expert
 * whose weight is exactly 0 is not asked at all: it may overflow on a token that it was not trained for.
 *
 * The experts that some token chose are numbered from 0 to active - 1, in the order of their own numbers. */
typedef struct Choice {
    int64_t N, K;    /* tokens, and experts of each */
    int64_t active;
    int64_t *expert; /* [active]: the expert's own number */
    int64_t *begin;  /* [active + 1]: where each one's assignments begin */
    int64_t *token;  /* [begin[active]]: the token of each assignment */
    int64_t *place;  /* [N, K]: the assignment of a token's k-th expert, -1 where its weight is 0 */
    int64_t *items;  /* [active]: for the operator's use, how many items of work each one has */
    int64_t *where;  /* [active]: for the operator's use, where each one's memory begins */
    Scratch *memory;
} Choice;

/* Checks weight float32 [N, K] and expert int64 [N, K] against N tokens and E experts, and sorts the assignments.
 * NULL, or what is wrong. Without a fault the choice is to be given back with `forget_choice`. */
const char *choose_experts(Tensor weight, Tensor expert, int64_t N, int64_t E, Choice *);
void forget_choice(Choice *);

static inline int64_t assignments_of(const Choice *choice, int64_t chosen) {
    return choice->begin[chosen + 1] - choice->begin[chosen];
}

/* Which of the experts from `from` on the item belongs to, by their `items`; `item` becomes its number within them. */
static inline int64_t expert_of_item(const Choice *choice, int64_t from, int64_t *item) {
    while (*item >= choice->items[from]) *item -= choice->items[from++];
    return from;
}

/* y[n] = sum over k, in the order of k, of weight[n, k] * results[place[n, k]]; y [N, C], results [assignments, C]. */
void combine_experts(const void *state, OrtKernelContext *, const Choice *, const float *weight, const float *results,
                     int64_t C, float *y);

#endif
