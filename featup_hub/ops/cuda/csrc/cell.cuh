// Resizing folded into the taps: cells, windows and the operator of one axis.
//
// A cell is a 2x2 block of outputs. Bicubic doubling, mirrored padding and seven taps together are
// one linear operator per axis; both outputs of a cell read source positions of one window, which
// starts 3 before the cell's own and is WINDOW wide. With A the two axes' operators (tap x window),
// a pixel's 7x7 taps k become A_y^T k A_x: 686 products a pixel, however many channels follow, and
// exact at the borders, which A knows about.
#pragma once

#include "features.cuh"

template <int SCALE>
struct Cell {
    static constexpr int STEP = 2 / SCALE;                // source positions from cell to cell
    static constexpr int WINDOW = DIAMETER + STEP - 1;    // 7 at scale 2; 8 at scale 1
    static constexpr int WEIGHTS = WINDOW * WINDOW;
};

// A block's tile, of cells (of source pixels where the source's gradient is gathered); a warp takes
// four of them at a time, 2x2, whose neighbourhoods overlap most, and a lane four channels.
constexpr int TILE_Y = 4, TILE_X = 8, TILE = TILE_Y * TILE_X;
constexpr int QUAD = 2, QUADS_X = TILE_X / QUAD, QUADS = TILE / (QUAD * QUAD);
constexpr int CHANNELS = 4;

template <int SCALE>
struct Folded {
    static constexpr int WINDOW = Cell<SCALE>::WINDOW;
    float weight[TILE][WINDOW][WINDOW][4];    // of cell, window row and column, output 2 dy + dx
    float along_y[2 * TILE_Y][DIAMETER][WINDOW];
    float along_x[2 * TILE_X][DIAMETER][WINDOW];
};

// One row of an axis' operator: what tap `tap` of output `at` reads of its cell's window.
template <int SCALE>
static __device__ __forceinline__ void operator_row(float* row, int at, int tap, int source_size)
{
    constexpr int WINDOW = Cell<SCALE>::WINDOW;
#pragma unroll
    for (int i = 0; i < WINDOW; i++)
        row[i] = 0.f;
    if (at >= SCALE * source_size)
        return;
    const int start = at / 2 * Cell<SCALE>::STEP - RADIUS;
    const int read = reflect(at + tap - RADIUS, SCALE * source_size);
    if (SCALE == 1) {
        row[read - start] = 1.f;
    } else {
        // Cubic convolution, a = -0.75, a quarter pixel off the source's grid.
        const float cubic[4] = {-0.10546875f, 0.87890625f, 0.26171875f, -0.03515625f};
        const int first = (read + 1) / 2 - 2;
#pragma unroll
        for (int i = 0; i < 4; i++)
            row[clamp(first + i, source_size) - start] += cubic[read % 2 ? i : 3 - i];
    }
}

// Fills both operators for the tile whose first output is (y, x).
template <int SCALE>
static __device__ __forceinline__ void prepare_operators(
    Folded<SCALE>& folded, int y, int x, int h, int w)
{
    for (int i = threadIdx.x; i < 2 * (TILE_Y + TILE_X) * DIAMETER; i += blockDim.x) {
        const int at = i / DIAMETER, tap = i % DIAMETER;
        if (at < 2 * TILE_Y)
            operator_row<SCALE>(folded.along_y[at][tap], y + at, tap, h);
        else
            operator_row<SCALE>(folded.along_x[at - 2 * TILE_Y][tap], x + at - 2 * TILE_Y, tap, w);
    }
}

// Where weight (i, j) of output (y, x) of the tile lies.
template <int SCALE>
static __device__ __forceinline__ float& weight_of(Folded<SCALE>& folded, int y, int x, int i, int j)
{
    return folded.weight[y / 2 * TILE_X + x / 2][i][j][y % 2 * 2 + x % 2];
}

// Calls visit(weight, address in a (H,W,49) kernel) for every tap of the tile that exists.
template <int SCALE, typename Visit>
static __device__ __forceinline__ void visit_taps(
    Folded<SCALE>& folded, int top, int left, int H, int W, Visit visit)
{
    constexpr int WIDTH = 2 * TILE_X * TAPS;
    for (int i = threadIdx.x; i < 2 * TILE_Y * WIDTH; i += blockDim.x) {
        const int y = i / WIDTH, x = i % WIDTH / TAPS, tap = i % TAPS;
        const bool inside = top + y < H && left + x < W;
        visit(weight_of<SCALE>(folded, y, x, tap / DIAMETER, tap % DIAMETER), inside,
              ((long long)(top + y) * W + left + x) * TAPS + tap);
    }
}

// Multiplies along x, in place: every row of taps by A_x, or, adjoint, of weights by its transpose.
// A thread keeps one column's operator and passes over rows.
template <int SCALE, bool ADJOINT>
static __device__ __forceinline__ void fold_rows(Folded<SCALE>& folded)
{
    constexpr int WINDOW = Cell<SCALE>::WINDOW, WIDTH = 2 * TILE_X;
    float axis[DIAMETER][WINDOW];
    const int x = threadIdx.x % WIDTH;
#pragma unroll
    for (int j = 0; j < DIAMETER; j++)
#pragma unroll
        for (int v = 0; v < WINDOW; v++)
            axis[j][v] = folded.along_x[x][j][v];
    for (int n = threadIdx.x / WIDTH; n < 2 * TILE_Y * DIAMETER; n += blockDim.x / WIDTH) {
        const int y = n / DIAMETER, i = n % DIAMETER;
        float from[WINDOW], to[WINDOW] = {};
#pragma unroll
        for (int v = 0; v < (ADJOINT ? WINDOW : DIAMETER); v++)
            from[v] = weight_of<SCALE>(folded, y, x, i, v);
#pragma unroll
        for (int j = 0; j < DIAMETER; j++)
#pragma unroll
            for (int v = 0; v < WINDOW; v++)
                to[ADJOINT ? j : v] += from[ADJOINT ? v : j] * axis[j][v];
#pragma unroll
        for (int v = 0; v < (ADJOINT ? DIAMETER : WINDOW); v++)
            weight_of<SCALE>(folded, y, x, i, v) = to[v];
    }
}

// The same along y, for every column of the window. A warp keeps one row's operator.
template <int SCALE, bool ADJOINT>
static __device__ __forceinline__ void fold_columns(Folded<SCALE>& folded)
{
    constexpr int WINDOW = Cell<SCALE>::WINDOW, WIDTH = 2 * TILE_X;
    for (int y = threadIdx.x / 32; y < 2 * TILE_Y; y += blockDim.x / 32) {
        float axis[DIAMETER][WINDOW];
#pragma unroll
        for (int i = 0; i < DIAMETER; i++)
#pragma unroll
            for (int u = 0; u < WINDOW; u++)
                axis[i][u] = folded.along_y[y][i][u];
        for (int n = threadIdx.x % 32; n < WIDTH * WINDOW; n += 32) {
            const int x = n % WIDTH, v = n / WIDTH;
            float from[WINDOW], to[WINDOW] = {};
#pragma unroll
            for (int u = 0; u < (ADJOINT ? WINDOW : DIAMETER); u++)
                from[u] = weight_of<SCALE>(folded, y, x, u, v);
#pragma unroll
            for (int i = 0; i < DIAMETER; i++)
#pragma unroll
                for (int u = 0; u < WINDOW; u++)
                    to[ADJOINT ? i : u] += from[ADJOINT ? u : i] * axis[i][u];
#pragma unroll
            for (int u = 0; u < (ADJOINT ? DIAMETER : WINDOW); u++)
                weight_of<SCALE>(folded, y, x, u, v) = to[u];
        }
    }
}

// Loads the taps of a tile, whose first output is (y, x), and folds them: k -> A_y^T k A_x.
template <int SCALE>
static __device__ __forceinline__ void load_weights(
    Folded<SCALE>& folded, const float* __restrict__ kernel, int y, int x, int h, int w)
{
    prepare_operators<SCALE>(folded, y, x, h, w);
    visit_taps<SCALE>(folded, y, x, SCALE * h, SCALE * w,
        [&](float& weight, bool inside, long long at) { weight = inside ? kernel[at] : 0.f; });
    __syncthreads();
    fold_rows<SCALE, false>(folded);
    __syncthreads();
    fold_columns<SCALE, false>(folded);
    __syncthreads();
}

// Adjoint: turns the gradient of a tile's weights into that of its taps and stores them.
template <int SCALE>
static __device__ __forceinline__ void store_taps(
    Folded<SCALE>& folded, float* __restrict__ grad_kernel, int y, int x, int h, int w)
{
    __syncthreads();
    fold_columns<SCALE, true>(folded);
    __syncthreads();
    fold_rows<SCALE, true>(folded);
    __syncthreads();
    visit_taps<SCALE>(folded, y, x, SCALE * h, SCALE * w,
        [&](float& weight, bool inside, long long at) { if (inside) grad_kernel[at] = weight; });
}

// The tile of a block: its first cell.
struct Corner {
    int y, x;
    __device__ Corner(int cells_x)
    {
        const int tiles_x = (cells_x + TILE_X - 1) / TILE_X;
        y = blockIdx.x / tiles_x * TILE_Y;
        x = blockIdx.x % tiles_x * TILE_X;
    }
};
