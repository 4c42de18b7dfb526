// Resizing folded into the taps: cells, windows and the operator of one axis.
//
// A cell is a 2x2 block of outputs. Bicubic resizing, mirrored padding and seven taps together are
// one linear operator per axis. Both outputs of a cell read one window of the source, WINDOW
// positions wide. With A_y and A_x the operators of the axes (tap x window), a pixel's 7x7 taps k
// become A_y^T k A_x: 686 products a pixel for any number of channels. A includes the borders, so
// they are exact.
//
// WINDOW is 7 where both axes are doubled. It is 8 where an axis keeps its size or grows by 1.75 to
// 2; then the distance between the windows of neighbouring cells varies.
#pragma once

#include "features.cuh"

static __device__ __forceinline__ int floor_divide(long long a, long long b)
{
    return a / b - (a % b < 0);
}

template <int WINDOW>
struct Axis {
    int source, output;    // sizes

    __device__ int cells() const { return (output + 1) / 2; }

    // The first source position of a cell's window: what output 2 cell - 3 reads first.
    __device__ int start(int cell) const
    {
        if (WINDOW == 7)
            return cell - RADIUS;
        if (source == output)
            return 2 * cell - RADIUS;
        return floor_divide((4LL * cell - 5) * source - output, 2LL * output) - 1;
    }

    // The first cell whose window holds a source position: the least with start >= at - 7.
    __device__ int first_reader(int at) const
    {
        if (source == output)
            return (at - RADIUS) >> 1;
        return -floor_divide(-(2LL * at - 11) * output - 5LL * source, 4LL * source);
    }

    // Weights with which tap `tap` of output `at` reads its cell's window, which begins at `start`.
    __device__ void row(float* to, int at, int tap, int start) const
    {
#pragma unroll
        for (int i = 0; i < WINDOW; i++)
            to[i] = 0.f;
        if (at >= output)
            return;
        const int read = reflect(at + tap - RADIUS, output);
        if (WINDOW == 8 && source == output) {
            to[read - start] = 1.f;
            return;
        }
        int below = (read + 1) / 2 - 1;    // the source position before the one to be read
        float t = read % 2 ? 0.25f : 0.75f;
        if (WINDOW == 8) {
            const long long doubled = (2LL * read + 1) * source - output;
            below = floor_divide(doubled, 2LL * output);
            t = (float)(doubled - 2LL * output * below) / (2.f * output);
        }
        // Cubic convolution, a = -0.75.
        const float s = 1.f - t;
        const float cubic[4] = {-0.75f * t * s * s, (1.25f * t - 2.25f) * t * t + 1.f,
                                (1.25f * s - 2.25f) * s * s + 1.f, -0.75f * s * t * t};
#pragma unroll
        for (int i = 0; i < 4; i++)
            to[clamp(below - 1 + i, source) - start] += cubic[i];
    }
};

// A block's tile of cells (of source pixels for the source's gradient). A warp takes 2x2 of them at
// a time, because their neighbourhoods overlap most; a lane takes four channels.
constexpr int TILE_Y = 4, TILE_X = 8, TILE = TILE_Y * TILE_X;
constexpr int QUAD = 2, QUADS_X = TILE_X / QUAD, QUADS = TILE / (QUAD * QUAD);
constexpr int CHANNELS = 4;

template <int WINDOW>
struct Folded {
    // Of a cell: window row and column, output 2 dy + dx. Padded by four floats, so that the same
    // weight of eight cells is in different banks.
    static constexpr int PITCH = 4 * (WINDOW * WINDOW + (WINDOW == 8));
    float weight[TILE][PITCH];
    float along_y[2 * TILE_Y][DIAMETER][WINDOW];
    float along_x[2 * TILE_X][DIAMETER][WINDOW];
    int start_y[TILE_Y], start_x[TILE_X];

    __device__ float* of(int cell, int u, int v) { return weight[cell] + 4 * (u * WINDOW + v); }
    __device__ const float* of(int cell, int u, int v) const
    {
        return weight[cell] + 4 * (u * WINDOW + v);
    }
    // Weight (u, v) of output (y, x) of the tile.
    __device__ float& at(int y, int x, int u, int v)
    {
        return of(y / 2 * TILE_X + x / 2, u, v)[y % 2 * 2 + x % 2];
    }
};

// Fills both operators for the tile whose first cell is (y, x).
template <int WINDOW>
static __device__ __forceinline__ void prepare_operators(
    Folded<WINDOW>& folded, Axis<WINDOW> rows, Axis<WINDOW> columns, int y, int x)
{
    for (int i = threadIdx.x; i < 2 * (TILE_Y + TILE_X) * DIAMETER; i += blockDim.x) {
        const int n = i / DIAMETER, tap = i % DIAMETER, m = n - 2 * TILE_Y;
        const bool vertical = n < 2 * TILE_Y;
        const Axis<WINDOW> axis = vertical ? rows : columns;
        const int at = vertical ? 2 * y + n : 2 * x + m, start = axis.start(at / 2);
        axis.row(vertical ? folded.along_y[n][tap] : folded.along_x[m][tap], at, tap, start);
        if (tap == 0)
            (vertical ? folded.start_y[n / 2] : folded.start_x[m / 2]) = start;
    }
}

// The outputs of a tile, and where a lane's two taps of an output lie among its weights. A warp moves
// the taps of one output at a time, 32 and 17 of them.
constexpr int OUTPUTS_X = 2 * TILE_X, OUTPUTS = 2 * TILE_Y * OUTPUTS_X;

template <int WINDOW>
static __device__ __forceinline__ float* tap_of(Folded<WINDOW>& folded, int output, int tap)
{
    return &folded.at(output / OUTPUTS_X, output % OUTPUTS_X, tap / DIAMETER, tap % DIAMETER);
}

// Multiplies along x, in place: every row of taps by A_x, or, adjoint, of weights by its transpose.
// A thread keeps one column's operator and passes over rows.
template <int WINDOW, bool ADJOINT>
static __device__ __forceinline__ void fold_rows(Folded<WINDOW>& folded)
{
    constexpr int WIDTH = 2 * TILE_X;
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
            from[v] = folded.at(y, x, i, v);
#pragma unroll
        for (int j = 0; j < DIAMETER; j++)
#pragma unroll
            for (int v = 0; v < WINDOW; v++)
                to[ADJOINT ? j : v] += from[ADJOINT ? v : j] * axis[j][v];
#pragma unroll
        for (int v = 0; v < (ADJOINT ? DIAMETER : WINDOW); v++)
            folded.at(y, x, i, v) = to[v];
    }
}

// The same along y, for every column of the window. A warp keeps one row's operator.
template <int WINDOW, bool ADJOINT>
static __device__ __forceinline__ void fold_columns(Folded<WINDOW>& folded)
{
    constexpr int WIDTH = 2 * TILE_X;
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
                from[u] = folded.at(y, x, u, v);
#pragma unroll
            for (int i = 0; i < DIAMETER; i++)
#pragma unroll
                for (int u = 0; u < WINDOW; u++)
                    to[ADJOINT ? i : u] += from[ADJOINT ? u : i] * axis[i][u];
#pragma unroll
            for (int u = 0; u < (ADJOINT ? DIAMETER : WINDOW); u++)
                folded.at(y, x, u, v) = to[u];
        }
    }
}

// Number of outputs: a warp loads their taps before it stores them, with two loads each in flight.
#ifndef JBU_TAP_OUTPUTS
#define JBU_TAP_OUTPUTS 8
#endif
constexpr int TAP_OUTPUTS = JBU_TAP_OUTPUTS;
static_assert(OUTPUTS_X % TAP_OUTPUTS == 0, "in one row of the tile");

// Loads the taps of a tile, whose first cell is (y, x), and folds them: k -> A_y^T k A_x.
template <int WINDOW>
static __device__ __forceinline__ void load_weights(
    Folded<WINDOW>& folded, const float* __restrict__ kernel, Axis<WINDOW> rows,
    Axis<WINDOW> columns, int y, int x)
{
    prepare_operators(folded, rows, columns, y, x);
    const int lane = threadIdx.x % 32, step = blockDim.x / 32 * TAP_OUTPUTS;
    for (int first = threadIdx.x / 32 * TAP_OUTPUTS; first < OUTPUTS; first += step) {
        const int top = 2 * y + first / OUTPUTS_X, left = 2 * x + first % OUTPUTS_X;
        const float* from = kernel + ((long long)top * columns.output + left) * TAPS + lane;
        float value[TAP_OUTPUTS][2] = {};
#pragma unroll
        for (int k = 0; k < TAP_OUTPUTS; k++)
            if (top < rows.output && left + k < columns.output) {
                value[k][0] = from[k * TAPS];
                if (lane + 32 < TAPS)
                    value[k][1] = from[k * TAPS + 32];
            }
#pragma unroll
        for (int k = 0; k < TAP_OUTPUTS; k++) {
            *tap_of(folded, first + k, lane) = value[k][0];
            if (lane + 32 < TAPS)
                *tap_of(folded, first + k, lane + 32) = value[k][1];
        }
    }
    __syncthreads();
    fold_rows<WINDOW, false>(folded);
    __syncthreads();
    fold_columns<WINDOW, false>(folded);
    __syncthreads();
}

// Adjoint: turns the gradient of a tile's weights into that of its taps and stores them.
template <int WINDOW>
static __device__ __forceinline__ void store_taps(
    Folded<WINDOW>& folded, float* __restrict__ grad_kernel, int y, int x, int H, int W)
{
    __syncthreads();
    fold_columns<WINDOW, true>(folded);
    __syncthreads();
    fold_rows<WINDOW, true>(folded);
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int output = threadIdx.x / 32; output < OUTPUTS; output += blockDim.x / 32) {
        const int top = 2 * y + output / OUTPUTS_X, left = 2 * x + output % OUTPUTS_X;
        if (top < H && left < W)
            for (int tap = lane; tap < TAPS; tap += 32)
                grad_kernel[((long long)top * W + left) * TAPS + tap] =
                    *tap_of(folded, output, tap);
    }
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
