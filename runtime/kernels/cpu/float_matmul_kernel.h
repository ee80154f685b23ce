/* The loops of float_matmul.h for one instruction set, written with the compiler's vectors; included by the files that
 * choose one, which define before:
 *
 * LANES                numbers in a vector: 4, 8 or 16
 * ROWS, SPAN           a tile of sums held in registers: ROWS rows of weights by SPAN panels
 * FEW_SUMS             vectors of sums held in registers where few rows are multiplied
 * half_vector(p)       LANES float16 at p, widened
 * sum_lanes(v)         the sum of a vector
 * transpose(source, offset, target, stride)  target[j * stride + i] = source[i][offset + j], i and j from 0 to 15
 */
#define ALWAYS static inline __attribute__((always_inline))

enum {
    AHEAD = 2,                 /* tiles of few rows between the one that is multiplied and the one that is fetched */
    FEW_CACHED = 6144,         /* numbers of x that stay in half the first-level cache */
    VECTORS = PANEL / LANES,   /* of a panel */
    DEPTH = 256,               /* numbers of K that a tile of widened weights holds, so that it stays in that cache */
    TILE_STRIDE = DEPTH + 16,  /* no power of two, so that the rows of a tile fall into different sets of the cache */
};

typedef float Loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t LooseShort __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

ALWAYS Vector load(const float *from) { return *(const Loose *)from; }
ALWAYS void store(float *to, Vector value) { *(Loose *)to = value; }

ALWAYS Vector stored_vector(const int type, const void *row, int64_t k) {
    if (type == TYPE_FLOAT) return load((const float *)row + k);
    const uint16_t *from = (const uint16_t *)row + k;
    if (type == TYPE_FLOAT16) return half_vector(from);
    return (Vector)(__builtin_convertvector(*(const LooseShort *)from, Bits) << 16);
}

/* One stored number: what is left of a row that is no multiple of the vectors. */
ALWAYS float stored_number(const int type, const void *row, int64_t k) {
    if (type == TYPE_FLOAT) return ((const float *)row)[k];
    uint16_t lanes[LANES] = {((const uint16_t *)row)[k]};
    return stored_vector(type, lanes, 0)[0];
}

/* -- few rows -- */

/* M rows of x by R rows of weights, which are `stride` numbers apart, over `depth` columns; added to y or put there. */
ALWAYS void few_tile(const int M, const int R, const int type, const float *const *x, int64_t k, const char *weights,
                     int64_t stride, int64_t depth, float *y, int64_t y_stride) {
    const int64_t size = type == TYPE_FLOAT ? 4 : 2, whole = depth / LANES * LANES;
    Vector sums[8][4];
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int r = 0; r < R; r++) sums[m][r] = (Vector){0};
    for (int64_t i = 0; i < whole; i += LANES) {
        Vector w[4];
        UNROLL
        for (int r = 0; r < R; r++) {
            w[r] = stored_vector(type, weights + r * stride * size, i);
            /* The rows after the next tile's: hardware looks ahead within a row and a page only. */
            __builtin_prefetch(weights + ((r + AHEAD * R) * stride + i) * size, 0, 2);
        }
        UNROLL
        for (int m = 0; m < M; m++) {
            Vector here = load(x[m] + k + i);
            UNROLL
            for (int r = 0; r < R; r++) sums[m][r] += here * w[r];
        }
    }
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int r = 0; r < R; r++) {
            float sum = sum_lanes(sums[m][r]);
            const char *row = weights + r * stride * size;
            for (int64_t i = whole; i < depth; i++) sum += x[m][k + i] * stored_number(type, row, i);
            y[m * y_stride + r] = k > 0 ? y[m * y_stride + r] + sum : sum;
        }
}

ALWAYS void few_rows(const int M, const int type, const float *const *x, const char *weights, int64_t count, int64_t K,
                     float *y, int64_t y_stride) {
    const int R = FEW_SUMS / M >= 4 ? 4 : FEW_SUMS / M >= 2 ? 2 : 1;
    const int64_t size = type == TYPE_FLOAT ? 4 : 2;
    /* So many columns at once that their x stay in the first-level cache. */
    const int64_t parts = (K * M + FEW_CACHED - 1) / FEW_CACHED, part = parts > 1 ? (K / parts + 31) / 32 * 32 : K;
    int64_t k = 0;
    do { /* once where K is 0: the sums are then zeros */
        const int64_t depth = K - k < part ? K - k : part;
        const char *here = weights + k * size;
        int64_t n = 0;
        for (; n + R <= count; n += R) few_tile(M, R, type, x, k, here + n * K * size, K, depth, y + n, y_stride);
        for (; n < count; n++) few_tile(M, 1, type, x, k, here + n * K * size, K, depth, y + n, y_stride);
        k += part;
    } while (k < K);
}

ALWAYS void few_of_type(const int type, const float *const *x, int M, const char *weights, int64_t count, int64_t K,
                        float *y, int64_t y_stride) {
    switch (M) {
    case 1: few_rows(1, type, x, weights, count, K, y, y_stride); break;
    case 2: few_rows(2, type, x, weights, count, K, y, y_stride); break;
    case 3: few_rows(3, type, x, weights, count, K, y, y_stride); break;
    case 4: few_rows(4, type, x, weights, count, K, y, y_stride); break;
    case 5: few_rows(5, type, x, weights, count, K, y, y_stride); break;
    case 6: few_rows(6, type, x, weights, count, K, y, y_stride); break;
    case 7: few_rows(7, type, x, weights, count, K, y, y_stride); break;
    case 8: few_rows(8, type, x, weights, count, K, y, y_stride); break;
    }
}

static void few(const float *const *x, int M, const StoredWeight *weight, int64_t first, int64_t count, float *y,
                int64_t y_stride) {
    const char *rows = (const char *)weight->data + (size_t)(first * weight->K) * stored_bytes(weight->type);
    if (weight->type == TYPE_FLOAT) few_of_type(TYPE_FLOAT, x, M, rows, count, weight->K, y, y_stride);
    else if (weight->type == TYPE_FLOAT16) few_of_type(TYPE_FLOAT16, x, M, rows, count, weight->K, y, y_stride);
    else few_of_type(TYPE_BFLOAT16, x, M, rows, count, weight->K, y, y_stride);
}

/* -- panels -- */

static void pack(const float *const *rows, int count, int64_t K, float *panel) {
    const float *lanes[PANEL];
    for (int lane = 0; lane < PANEL; lane++) lanes[lane] = rows[lane < count ? lane : 0];
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) transpose(lanes, k, panel + k * PANEL, PANEL);
    for (; k < K; k++)
        for (int lane = 0; lane < PANEL; lane++) panel[k * PANEL + lane] = lanes[lane][k];
}

ALWAYS void widen_row(const int type, const void *row, int64_t k, int depth, float *to) {
    int i = 0;
    for (; i + LANES <= depth; i += LANES) store(to + i, stored_vector(type, row, k + i));
    for (; i < depth; i++) to[i] = stored_number(type, row, k + i);
}

/* Rows n ... n + ROWS - 1 of the weights, columns k ... k + depth - 1, as float32; rows from `end` on are not read. */
static void widen_tile(const StoredWeight *weight, int64_t n, int64_t end, int64_t k, int depth, float *tile) {
    for (int r = 0; r < ROWS && n + r < end; r++) {
        const char *row = (const char *)weight->data + (size_t)((n + r) * weight->K) * stored_bytes(weight->type);
        float *to = tile + r * TILE_STRIDE;
        if (weight->type == TYPE_FLOAT) widen_row(TYPE_FLOAT, row, k, depth, to);
        else if (weight->type == TYPE_FLOAT16) widen_row(TYPE_FLOAT16, row, k, depth, to);
        else widen_row(TYPE_BFLOAT16, row, k, depth, to);
    }
}

/* Rows of weights that will be needed soon. */
typedef struct Ahead {
    const char *rows;
    int64_t row_bytes;
    int count, size;
} Ahead;

/* One tile of weights by P panels, which are `stride` numbers apart. Sums of a panel: [BLOCK, PANEL]. */
ALWAYS void multiply_tile(const int P, const float *tile, const float *x, int64_t stride, int depth, int add,
                          float *sums, Ahead ahead) {
    Vector in_registers[ROWS][SPAN * VECTORS];
    UNROLL
    for (int r = 0; r < ROWS; r++)
        UNROLL
        for (int v = 0; v < P * VECTORS; v++) in_registers[r][v] = (Vector){0};
    for (int k = 0; k < depth;) {
        for (int r = 0; r < ahead.count; r++)
            __builtin_prefetch(ahead.rows + r * ahead.row_bytes + k * ahead.size, 0, 2);
        for (const int end = depth - k < 16 ? depth : k + 16; k < end; k++) {
            Vector here[SPAN * VECTORS];
            UNROLL
            for (int v = 0; v < P * VECTORS; v++)
                here[v] = load(x + v / VECTORS * stride + (int64_t)k * PANEL + v % VECTORS * LANES);
            UNROLL
            for (int r = 0; r < ROWS; r++) {
                float w = tile[r * TILE_STRIDE + k];
                UNROLL
                for (int v = 0; v < P * VECTORS; v++) in_registers[r][v] += here[v] * w;
            }
        }
    }
    UNROLL
    for (int r = 0; r < ROWS; r++)
        UNROLL
        for (int v = 0; v < P * VECTORS; v++) {
            float *to = sums + v / VECTORS * (BLOCK * PANEL) + r * PANEL + v % VECTORS * LANES;
            store(to, add ? load(to) + in_registers[r][v] : in_registers[r][v]);
        }
}

static void panels(const float *packed, int number, const StoredWeight *weight, int64_t first, int count, float *sums) {
    const int64_t stride = weight->K * PANEL;
    const int size = (int)stored_bytes(weight->type), steps = (number + SPAN - 1) / SPAN;
    float tile[ROWS * TILE_STRIDE] = {0};
    if (weight->K == 0) memset(sums, 0, sizeof *sums * (size_t)number * BLOCK * PANEL);
    for (int64_t k = 0; k < weight->K; k += DEPTH) {
        const int depth = weight->K - k < DEPTH ? (int)(weight->K - k) : DEPTH;
        for (int n = 0; n < count; n += ROWS) {
            widen_tile(weight, first + n, first + count, k, depth, tile);
            const float *x = packed + k * PANEL;
            float *to = sums + n * PANEL;
            /* The next tile is fetched while this one is multiplied, a share of its rows with each step. */
            const int64_t next_n = n + ROWS < count ? n + ROWS : 0, next_k = n + ROWS < count ? k : k + DEPTH;
            Ahead ahead = {(const char *)weight->data + ((first + next_n) * weight->K + next_k) * size,
                           weight->K * size, (ROWS + steps - 1) / steps, size};
            for (int p = 0; p < number; p += SPAN) {
                float *sums_of = to + p * (BLOCK * PANEL);
                if (p + SPAN <= number) multiply_tile(SPAN, tile, x + p * stride, stride, depth, k > 0, sums_of, ahead);
                else multiply_tile(1, tile, x + p * stride, stride, depth, k > 0, sums_of, ahead);
                ahead.rows += ahead.count * ahead.row_bytes;
            }
        }
    }
}

static void unpack(const float *sums, int64_t M, int count, float *y, int64_t y_stride) {
    float edge[16 * PANEL];
    for (int64_t m = 0; m < M; m += PANEL, sums += BLOCK * PANEL)
        for (int n = 0; n < count; n += 16) {
            const float *rows[16];
            for (int i = 0; i < 16; i++) rows[i] = sums + (n + i) * PANEL;
            const int lanes = M - m < PANEL ? (int)(M - m) : PANEL, wide = count - n < 16 ? count - n : 16;
            if (lanes == PANEL && wide == 16) {
                transpose(rows, 0, y + m * y_stride + n, y_stride);
                continue;
            }
            transpose(rows, 0, edge, 16);
            for (int lane = 0; lane < lanes; lane++)
                memcpy(y + (m + lane) * y_stride + n, edge + lane * 16, sizeof *y * (size_t)wide);
        }
}
