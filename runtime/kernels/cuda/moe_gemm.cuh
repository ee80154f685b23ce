// Tiles of the grouped product: which block has which, how they lie in shared memory, how fragments are loaded.
#pragma once
#include "moe_matrix.cuh"

// A tile is TILE_ROWS tokens times 128 rows of weights, over DEPTH numbers at a time, by four warps.
constexpr u32 THREADS = 128, TILE_WEIGHTS = 128, DEPTH = 32, VECTORS = DEPTH / 8;
constexpr u32 WARPS_DOWN = TILE_ROWS == 128 ? 2 : 1, WARPS_ACROSS = 4 / WARPS_DOWN;
constexpr int ROW_FRAGMENTS = TILE_ROWS / 16 / WARPS_DOWN;         // of 16 tokens, for a warp
constexpr int WEIGHT_FRAGMENTS = TILE_WEIGHTS / 8 / WARPS_ACROSS;  // of 8 rows of weights, for a warp
constexpr u32 ROWS_BYTES = TILE_ROWS * DEPTH * 2;  // of a stage, before its weights
constexpr int MATRICES = GATED ? 2 : 1;
constexpr u32 WIDTH = TILE_WEIGHTS / MATRICES;  // columns of the result in a tile
static_assert(TILE_ROWS == 128 || TILE_ROWS == 64 || TILE_ROWS == 32, "tiles that four warps share evenly");

// Where vector `vector` of row `row` lies in a tile: any eight rows' same vectors are in different banks.
DEVICE u32 tile_offset(u32 row, u32 vector) { return row * (DEPTH * 2) + ((vector ^ (row >> 1 & 3)) * 16); }

// What a thread copies into a tile in each step: vectors of N rows, a bit of `there` for each that exists.
template <int N> struct VectorCopies {
    const ELEMENT* from[N];
    u32 there;
};

template <int N> DEVICE void copy_vectors(u8* tile, const VectorCopies<N>& copies, u32 at, u32 depth) {
    const u32 first = thread_x() / VECTORS, vector = thread_x() % VECTORS, column = at + vector * 8;
    const bool inside = column < depth;
#pragma unroll
    for (int j = 0; j < N; j++)
        copy_async_16(tile + tile_offset(first + THREADS / VECTORS * j, vector), copies.from[j] + (inside ? column : 0),
                      inside && (copies.there >> j & 1));
}

// Which row of which matrix a tile's row of weights is: a warp has the same rows of gate and of up.
struct TileRow {
    u32 column;  // of the result
    bool of_up;
};

DEVICE TileRow tile_row(u32 row, u32 column_tile) {
    constexpr u32 OF_WARP = WEIGHT_FRAGMENTS * 8, OF_MATRIX = OF_WARP / MATRICES;
    const u32 of_warp = row % OF_WARP;
    return {column_tile * WIDTH + row / OF_WARP * OF_MATRIX + of_warp % OF_MATRIX, of_warp >= OF_MATRIX};
}

// In shared memory, behind the stages.
struct TilePlace {
    u32 expert, first, rows;  // `first` in the expert's list; no rows: nothing is left for this block
    u32 pad;
    u32 assignment[TILE_ROWS];
};

// Blocks are numbered so that those at work at one time share tokens and weights in the L2: `together` tiles of tokens
// beside each other, then the next columns.
DEVICE void block_tile(u32& row_tile, u32& column_tile, u32 together, u32 column_tiles) {
    const u32 in_group = together * column_tiles, group = block_x() / in_group, rest = block_x() % in_group;
    row_tile = group * together + rest % together;
    column_tile = rest / together;
}

// All threads take part. Experts have ⌈count / TILE_ROWS⌉ tiles each, one after the other.
DEVICE void find_tile(TilePlace& place, u32 row_tile, const u32* count, const u32* list, u32 experts, u32 list_length) {
    if (thread_x() == 0) place.rows = 0;
    block_sync();
    if (warp() == 0) {
        u32 before = 0;
        for (u32 base = 0; base < experts; base += 32) {
            const u32 rows = base + lane() < experts ? count[base + lane()] : 0;
            const u32 tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
            u32 through = tiles;  // tiles up to and with this lane's expert
            for (u32 step = 1; step < 32; step *= 2) {
                const u32 lower = shuffle(through, lane() >= step ? lane() - step : 0);
                through += lane() >= step ? lower : 0;
            }
            const u32 start = before + through - tiles;
            if (row_tile >= start && row_tile < start + tiles) {
                place.expert = base + lane();
                place.first = (row_tile - start) * TILE_ROWS;
                place.rows = rows - place.first < TILE_ROWS ? rows - place.first : TILE_ROWS;
            }
            before += shuffle(through, 31);
        }
    }
    block_sync();
    for (u32 r = thread_x(); r < place.rows; r += THREADS)
        place.assignment[r] = list[u64(place.expert) * list_length + place.first + r];
    block_sync();
}

// sum += tokens · weightsᵀ over one stage.
template <typename T>
DEVICE void multiply_stage(float (&sum)[ROW_FRAGMENTS][WEIGHT_FRAGMENTS][4], const u8* tokens, const u8* weights) {
    const u32 rows = warp() / WARPS_ACROSS * (ROW_FRAGMENTS * 16) + (lane() & 15);
    const u32 columns = warp() % WARPS_ACROSS * (WEIGHT_FRAGMENTS * 8) + (lane() & 7) + (lane() >> 4) * 8;
#pragma unroll
    for (u32 step = 0; step < VECTORS; step += 2) {
        u32 a[ROW_FRAGMENTS][4], b[WEIGHT_FRAGMENTS][2];
#pragma unroll
        for (int m = 0; m < ROW_FRAGMENTS; m++)
            load_matrices(a[m], tokens + tile_offset(rows + 16 * m, step + (lane() >> 4)));
#pragma unroll
        for (int n = 0; n < WEIGHT_FRAGMENTS; n += 2) {
            u32 two[4];
            load_matrices(two, weights + tile_offset(columns + 8 * n, step + (lane() >> 3 & 1)));
            b[n][0] = two[0];
            b[n][1] = two[1];
            b[n + 1][0] = two[2];
            b[n + 1][1] = two[3];
        }
#pragma unroll
        for (int m = 0; m < ROW_FRAGMENTS; m++)
#pragma unroll
            for (int n = 0; n < WEIGHT_FRAGMENTS; n++) mma_16x8x16<T>(sum[m][n], a[m], b[n]);
    }
}
