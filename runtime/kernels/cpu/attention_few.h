/* FewQueries: every key and value goes from memory through a register once. Part of attention_loops.h. */

enum { FEW_SLOTS = 64, FEW_KEYS = VEC / FEW_ROWS, AHEAD = 8192 };

/* Asks for what is read AHEAD bytes later: keys and values alternate too fast for the machine to find out by itself. */
INLINE void ask_for(const char *at, int64_t bytes) {
    const uintptr_t ahead = (uintptr_t)at + AHEAD; /* may be past the ring's end, where asking does no harm */
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)(ahead + (uintptr_t)i), 0, 3);
}

/* score[r, j] of FEW_ROWS rows */
INLINE void few_scores(const RingKind kind, const FewQueries *q, const float *query, const char *key, int64_t count,
                       float *score) {
    const int64_t whole = q->D / VEC * VEC, bytes = q->D * (int64_t)ring_element(kind);
    for (int64_t j = 0; j < count; j += FEW_KEYS) {
        const char *at[FEW_KEYS];
        /* Past the last key it is taken again. */
        UNROLL for (int k = 0; k < FEW_KEYS; k++) at[k] = key + (j + k < count ? j + k : count - 1) * bytes;
        UNROLL for (int k = 0; k < FEW_KEYS; k++) ask_for(at[k], bytes);
        Vec sum[FEW_ROWS * FEW_KEYS];
        UNROLL for (int i = 0; i < FEW_ROWS * FEW_KEYS; i++) sum[i] = zero();
        for (int64_t d = 0; d < whole; d += VEC) {
            Vec x[FEW_KEYS];
            UNROLL for (int k = 0; k < FEW_KEYS; k++) x[k] = widened(kind, at[k], d);
            UNROLL for (int r = 0; r < FEW_ROWS; r++) {
                Vec y = load(query + r * q->width + d);
                UNROLL for (int k = 0; k < FEW_KEYS; k++) sum[r * FEW_KEYS + k] = madd(x[k], y, sum[r * FEW_KEYS + k]);
            }
        }
        if (whole < q->D)
            UNROLL for (int k = 0; k < FEW_KEYS; k++) {
                Vec x = widened_tail(kind, at[k], whole, q->D - whole);
                UNROLL for (int r = 0; r < FEW_ROWS; r++)
                    sum[r * FEW_KEYS + k] = madd(x, load(query + r * q->width + whole), sum[r * FEW_KEYS + k]);
            }
        float sums[VEC];
        store(sums, sums_of(sum));
        UNROLL for (int r = 0; r < FEW_ROWS; r++)
            memcpy(score + r * FEW_SLOTS + j, sums + r * FEW_KEYS, FEW_KEYS * sizeof(float));
    }
}

/* attended[r] += sum over j of weight[r, j] * value[j] in `vecs` vectors from column c on; the last one is cut short to
 * `tail` numbers where that is not 0. */
INLINE void few_columns(const RingKind kind, const int vecs, int64_t tail, const char *value, int64_t bytes,
                        const float *weight, int64_t count, int64_t c, float *attended, int64_t width) {
    Vec sum[FEW_ROWS][TILE_VECS];
    UNROLL for (int r = 0; r < FEW_ROWS; r++) UNROLL for (int v = 0; v < vecs; v++)
        sum[r][v] = load(attended + r * width + c + v * VEC);
    for (int64_t j = 0; j < count; j++) {
        const char *at = value + j * bytes;
        if (c == 0) ask_for(at, bytes);
        Vec x[TILE_VECS];
        UNROLL for (int v = 0; v < vecs; v++)
            x[v] = tail != 0 ? widened_tail(kind, at, c + v * VEC, tail) : widened(kind, at, c + v * VEC);
        UNROLL for (int r = 0; r < FEW_ROWS; r++) {
            Vec w = spread(weight[r * FEW_SLOTS + j]);
            UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = madd(w, x[v], sum[r][v]);
        }
    }
    UNROLL for (int r = 0; r < FEW_ROWS; r++) UNROLL for (int v = 0; v < vecs; v++)
        store(attended + r * width + c + v * VEC, sum[r][v]);
}

INLINE void few_weigh(const RingKind kind, const FewQueries *q, const char *value, const float *weight, int64_t count,
                      float *attended) {
    const int64_t bytes = q->D * (int64_t)ring_element(kind);
    int64_t c = 0;
    for (; c + TILE_VECS * VEC <= q->D; c += TILE_VECS * VEC)
        few_columns(kind, TILE_VECS, 0, value, bytes, weight, count, c, attended, q->width);
    for (; c + VEC <= q->D; c += VEC) few_columns(kind, 1, 0, value, bytes, weight, count, c, attended, q->width);
    if (c < q->D) few_columns(kind, 1, q->D - c, value, bytes, weight, count, c, attended, q->width);
}

/* Scores of one row become weights; FEW_SLOTS - count scores more may be overwritten. */
static void few_soften(const FewQueries *q, int64_t row, float *score, int64_t count) {
    for (int64_t j = count; j < round_up(count, VEC); j++) score[j] = -INFINITY;
    Vec most = spread(q->greatest[row]);
    for (int64_t j = 0; j < count; j += VEC) most = max_of(most, load(score + j));
    Vec greatest = spread(greatest_of(most)), total = zero();
    for (int64_t j = 0; j < count; j += VEC) {
        Vec weight = exp_of(sub(load(score + j), greatest));
        store(score + j, weight);
        total = add(total, weight);
    }
    Vec shrink = exp_of(sub(spread(q->greatest[row]), greatest));
    float *attended = q->attended + row * q->width;
    for (int64_t d = 0; d < q->width; d += VEC) store(attended + d, mul(shrink, load(attended + d)));
    float before[VEC], now[VEC];
    store(before, shrink);
    store(now, greatest);
    q->total[row] = q->total[row] * before[0] + sum_of(total);
    q->greatest[row] = now[0];
}

INLINE void attend_few_of(const RingKind kind, const FewQueries *q, const Slots *slots) {
    _Alignas(64) float score[FEW_ROWS * FEW_SLOTS];
    const int64_t bytes = q->D * (int64_t)ring_element(kind);
    for (int64_t begin = 0; begin < slots->count; begin += FEW_SLOTS) {
        const int64_t rest = slots->count - begin, count = rest < FEW_SLOTS ? rest : FEW_SLOTS;
        const char *key = (const char *)slots->key + begin * bytes, *value = (const char *)slots->value + begin * bytes;
        for (int64_t row = 0; row < q->rows; row += FEW_ROWS) {
            few_scores(kind, q, q->query + row * q->width, key, count, score);
            for (int64_t r = 0; r < FEW_ROWS; r++) {
                float *s = score + r * FEW_SLOTS;
                if (kind == RING_INT8)
                    for (int64_t j = 0; j < count; j++) s[j] *= slots->key_scale[begin + j];
                few_soften(q, row + r, s, count);
                if (kind == RING_INT8)
                    for (int64_t j = 0; j < count; j++) s[j] *= slots->value_scale[begin + j];
            }
            few_weigh(kind, q, value, score, count, q->attended + row * q->width);
        }
    }
}

static void attend_few(const FewQueries *q, const Slots *slots) {
    switch (slots->kind) {
    case RING_FLOAT: attend_few_of(RING_FLOAT, q, slots); break;
    case RING_HALF: attend_few_of(RING_HALF, q, slots); break;
    default: attend_few_of(RING_INT8, q, slots); break;
    }
}
