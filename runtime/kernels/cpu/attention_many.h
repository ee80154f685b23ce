/* ManyQueries: they lie side by side in vectors, so that nothing is summed across a vector. Part of attention_loops.h. */

/* score[i] = key[i] . query for `keys` keys and `vecs` vectors of queries; both are constants where this is called. */
INLINE void score_tile(const int keys, const int vecs, const float *key, const float *query, int64_t D, float *score) {
    Vec sum[TILE][TILE_VECS];
    UNROLL for (int i = 0; i < keys; i++) UNROLL for (int v = 0; v < vecs; v++) sum[i][v] = zero();
    for (int64_t d = 0; d < D; d++) {
        Vec q[TILE_VECS];
        UNROLL for (int v = 0; v < vecs; v++) q[v] = load(query + d * LANES + v * VEC);
        UNROLL for (int i = 0; i < keys; i++) {
            Vec k = spread(key[i * D + d]);
            UNROLL for (int v = 0; v < vecs; v++) sum[i][v] = madd(k, q[v], sum[i][v]);
        }
    }
    UNROLL for (int i = 0; i < keys; i++) UNROLL for (int v = 0; v < vecs; v++) store(score + i * LANES + v * VEC, sum[i][v]);
}

/* attended[i] = attended[i] * shrink + sum over j of weight[j] * value[j][i], for `columns` columns i. */
INLINE void weigh_tile(const int columns, const int vecs, const float *value, const float *weight, int64_t count,
                       int64_t D, const float *shrink, float *attended) {
    Vec sum[TILE][TILE_VECS];
    UNROLL for (int v = 0; v < vecs; v++) {
        Vec s = load(shrink + v * VEC);
        UNROLL for (int i = 0; i < columns; i++) sum[i][v] = mul(s, load(attended + i * LANES + v * VEC));
    }
    for (int64_t j = 0; j < count; j++) {
        Vec w[TILE_VECS];
        UNROLL for (int v = 0; v < vecs; v++) w[v] = load(weight + j * LANES + v * VEC);
        UNROLL for (int i = 0; i < columns; i++) {
            Vec x = spread(value[j * D + i]);
            UNROLL for (int v = 0; v < vecs; v++) sum[i][v] = madd(x, w[v], sum[i][v]);
        }
    }
    UNROLL for (int i = 0; i < columns; i++) UNROLL for (int v = 0; v < vecs; v++) store(attended + i * LANES + v * VEC, sum[i][v]);
}

INLINE void score_column(const int vecs, const ManyQueries *q, int64_t lane, const float *key, int64_t count) {
    int64_t i = 0, D = q->D;
    for (; i + TILE <= count; i += TILE) score_tile(TILE, vecs, key + i * D, q->query + lane, D, q->score + i * LANES + lane);
    for (; i + 2 <= count; i += 2) score_tile(2, vecs, key + i * D, q->query + lane, D, q->score + i * LANES + lane);
    for (; i < count; i++) score_tile(1, vecs, key + i * D, q->query + lane, D, q->score + i * LANES + lane);
}

INLINE void weigh_column(const int vecs, const ManyQueries *q, int64_t lane, const float *value, int64_t count,
                         const float *shrink) {
    int64_t i = 0, D = q->D;
    for (; i + TILE <= D; i += TILE)
        weigh_tile(TILE, vecs, value + i, q->score + lane, count, D, shrink + lane, q->attended + i * LANES + lane);
    for (; i + 2 <= D; i += 2)
        weigh_tile(2, vecs, value + i, q->score + lane, count, D, shrink + lane, q->attended + i * LANES + lane);
}

/* Scores of one vector of queries become weights relative to the greatest score so far. */
static void soften(const ManyQueries *q, int64_t lane, int64_t count, const float *from, const float *to, float *shrink) {
    float *score = q->score + lane;
    Vec before = load(q->greatest + lane), greatest = before;
    if (from != NULL) {
        Vec first = load(from + lane), end = load(to + lane);
        for (int64_t j = 0; j < count; j++) {
            Vec s = keep_between(load(score + j * LANES), spread((float)j), first, end);
            store(score + j * LANES, s);
            greatest = max_of(greatest, s);
        }
    } else {
        for (int64_t j = 0; j < count; j++) greatest = max_of(greatest, load(score + j * LANES));
    }
    Vec less = exp_of(sub(before, greatest)), total = mul(load(q->total + lane), less);
    for (int64_t j = 0; j < count; j++) {
        Vec weight = exp_of(sub(load(score + j * LANES), greatest));
        store(score + j * LANES, weight);
        total = add(total, weight);
    }
    store(q->greatest + lane, greatest);
    store(q->total + lane, total);
    store(shrink + lane, less);
}

static void attend_many(const ManyQueries *q, const float *key, const float *value, int64_t count, const float *from,
                        const float *to) {
    _Alignas(64) float shrink[LANES];
    int64_t lane = 0;
    for (; lane + TILE_VECS * VEC <= q->lanes; lane += TILE_VECS * VEC) score_column(TILE_VECS, q, lane, key, count);
    for (; TILE_VECS > 2 && lane + 2 * VEC <= q->lanes; lane += 2 * VEC) score_column(2, q, lane, key, count);
    for (; lane + VEC <= q->lanes; lane += VEC) score_column(1, q, lane, key, count);
    for (lane = 0; lane < q->lanes; lane += VEC) soften(q, lane, count, from, to, shrink);
    lane = 0;
    for (; lane + TILE_VECS * VEC <= q->lanes; lane += TILE_VECS * VEC) weigh_column(TILE_VECS, q, lane, value, count, shrink);
    for (; TILE_VECS > 2 && lane + 2 * VEC <= q->lanes; lane += 2 * VEC) weigh_column(2, q, lane, value, count, shrink);
    for (; lane + VEC <= q->lanes; lane += VEC) weigh_column(1, q, lane, value, count, shrink);
}
