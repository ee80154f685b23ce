/* Decoding: the heads of one token over the slots that it sees, which several threads may share (Dao et al. 2023,
 * "Flash-Decoding for long-context inference"). */
#include "attention.h"

#include <float.h>
#include <math.h>
#include <string.h>

size_t part_floats(const Attention *a) {
    const int64_t rows = round_up(a->group, FEW_ROWS), width = round_up(a->D, WIDEST);
    return (size_t)(2 * rows * width + round_up(2 * rows, WIDEST));
}

static FewQueries laid_out(const Attention *a, float *memory) {
    FewQueries few = {.rows = round_up(a->group, FEW_ROWS), .D = a->D, .width = round_up(a->D, WIDEST)};
    few.query = memory;
    few.attended = few.query + few.rows * few.width;
    few.greatest = few.attended + few.rows * few.width;
    few.total = few.greatest + few.rows;
    return few;
}

void attend_part(const Attention *a, int64_t b, int64_t g, int64_t part, int64_t parts, float *memory) {
    const int64_t position = a->start[b], first = first_visible(a, position), seen = position + 1 - first;
    const int64_t begin = first + seen * part / parts, end = first + seen * (part + 1) / parts;
    if (part == parts - 1) write_token(a, b, g, 0); /* only this part reads the token's slot */
    FewQueries few = laid_out(a, memory);
    memset(memory, 0, part_floats(a) * sizeof *memory);
    for (int64_t r = 0; r < few.rows; r++) few.greatest[r] = -FLT_MAX;
    for (int64_t r = 0; r < a->group; r++) rotated_query(a, b, g * a->group + r, 0, few.query + r * few.width);
    for (int64_t at = begin; at < end;) {
        const Slots slots = slots_from(a, b, g, at, end);
        a->loops->attend_few(&few, &slots);
        at += slots.count;
    }
}

void merge_parts(const Attention *a, int64_t b, int64_t g, int64_t parts, float *memory) {
    const int64_t each = (int64_t)part_floats(a);
    FewQueries sum = laid_out(a, memory);
    for (int64_t r = 0; r < a->group; r++) {
        float *row = sum.attended + r * sum.width, greatest = sum.greatest[r], total = 0;
        for (int64_t p = 1; p < parts; p++) greatest = fmaxf(greatest, laid_out(a, memory + p * each).greatest[r]);
        for (int64_t p = 0; p < parts; p++) {
            const FewQueries part = laid_out(a, memory + p * each);
            const float weight = expf(part.greatest[r] - greatest), *from = part.attended + r * part.width;
            total += weight * part.total[r];
            for (int64_t d = 0; d < a->D; d++) row[d] = (p == 0 ? 0 : row[d]) + weight * from[d];
        }
        float *y = a->attended + (b * a->T * a->H + g * a->group + r) * a->D;
        for (int64_t d = 0; d < a->D; d++) y[d] = row[d] / total;
    }
}
