#include "expert_choice.h"

#include <string.h>

#include "shared_scratch.h"

const char *choose_experts(Tensor weight, Tensor expert, int64_t N, int64_t E, Choice *choice) {
    if (weight.rank != 2 || expert.rank != 2 || weight.dims[0] != N || expert.dims[0] != N ||
        weight.dims[1] != expert.dims[1])
        return "a mixture of experts takes weights [N, K] and experts' numbers [N, K] for its N tokens";
    const int64_t K = expert.dims[1], total = N * K;
    Scratch *memory = borrow(sizeof(int64_t) * (size_t)(5 * E + 1 + 2 * total));
    if (memory == NULL) return "a mixture of experts got no memory for its choice of experts";
    int64_t *next = memory->memory; /* first how many tokens an expert has, then where its next one goes */
    int64_t *begin_of = next + 2 * E, *token = begin_of + E + 1, *place = token + total;
    *choice = (Choice){N, K, 0, next + E, begin_of, token, place, place + total, place + total + E, memory};

    const int64_t *number = expert.data;
    const float *share = weight.data;
    memset(next, 0, sizeof *next * (size_t)E);
    for (int64_t i = 0; i < total; i++) {
        if (number[i] < 0 || number[i] >= E) {
            give_back(memory);
            return "a token is assigned to an expert that does not exist";
        }
        next[number[i]] += share[i] != 0;
    }
    int64_t begin = 0;
    for (int64_t e = 0; e < E; e++) {
        int64_t count = next[e];
        next[e] = begin;
        if (count == 0) continue;
        choice->expert[choice->active] = e;
        choice->begin[choice->active++] = begin;
        begin += count;
    }
    choice->begin[choice->active] = begin;
    for (int64_t i = 0; i < total; i++) {
        choice->place[i] = share[i] != 0 ? next[number[i]]++ : -1;
        if (choice->place[i] >= 0) choice->token[choice->place[i]] = i / K;
    }
    return NULL;
}

void forget_choice(Choice *choice) { give_back(choice->memory); }

typedef struct Sum {
    const Choice *choice;
    const float *weight, *results;
    float *y;
    int64_t C, each; /* each: tokens that one item takes */
} Sum;

static void add_weighted(float *restrict y, const float *restrict result, float weight, int64_t C) {
    for (int64_t c = 0; c < C; c++) y[c] += weight * result[c];
}

static void sum_tokens(void *data, size_t item) {
    const Sum *sum = data;
    const Choice *choice = sum->choice;
    const int64_t first = (int64_t)item * sum->each, rest = choice->N - first;
    for (int64_t n = first; n < first + (rest < sum->each ? rest : sum->each); n++) {
        float *y = sum->y + n * sum->C;
        memset(y, 0, sizeof *y * (size_t)sum->C);
        for (int64_t i = n * choice->K; i < (n + 1) * choice->K; i++)
            if (choice->place[i] >= 0)
                add_weighted(y, sum->results + choice->place[i] * sum->C, sum->weight[i], sum->C);
    }
}

void combine_experts(const void *state, OrtKernelContext *context, const Choice *choice, const float *weight,
                     const float *results, int64_t C, float *y) {
    /* Some ten microseconds' work: fewer tokens than that are not worth waking a thread for. */
    int64_t each = 65536 / (choice->K * C + 1);
    Sum sum = {choice, weight, results, y, C, each < 1 ? 1 : each};
    parallel_for(state, context, sum_tokens, (size_t)((choice->N + sum.each - 1) / sum.each), &sum);
}
