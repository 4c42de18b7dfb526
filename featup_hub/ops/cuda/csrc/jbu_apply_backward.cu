// The adjoints of jbu_apply.cu: gradients of source and kernel.
//
// ABI: options and words as in jbu_apply.cu; WINDOW2 = 49 (_7) or 64 (_8).
//
//   fold_7, _8                     PP iiii    kernel, out folded (B,cy,cx,WINDOW2,4), h, w, H, W
//       grid (ceil(cx/8)*ceil(cy/4), 1, B)             block 256  shared 29840 (_7), 38704 (_8)
//   apply_backward_source_7, _8    PPP iiiiii grad_output, folded, out grad_source,
//                                             h, w, H, W, C, span
//       grid (ceil(w/8)*ceil(h/4), ceil(C/span), B)    block 128  shared 25280 (_7), 41712 (_8)
//   apply_backward_kernel_7, _8    PPP iiiii  source, grad_output, out grad_kernel (B,H,W,49),
//                                             h, w, H, W, C
//       grid (ceil(cx/8)*ceil(cy/4), 1, B)             block 224 (_7), 256 (_8)
//                                                      shared 29840 (_7), 38704 (_8)
//
// torch computes the gradient of bias, grad_output summed over B, H, W.

#include "cell.cuh"

constexpr int FOLD_THREADS = 256, SOURCE_THREADS = 128;

template <int WINDOW>
static __device__ __forceinline__ void fold(
    Folded<WINDOW>& folded, const float* __restrict__ kernel, float* __restrict__ out,
    Axis<WINDOW> rows, Axis<WINDOW> columns)
{
    constexpr int WEIGHTS = 4 * WINDOW * WINDOW;
    const int cells_y = rows.cells(), cells_x = columns.cells();
    const Corner cell(cells_x);
    kernel += (long long)blockIdx.z * rows.output * columns.output * TAPS;
    out += (long long)blockIdx.z * cells_y * cells_x * WEIGHTS;
    load_weights(folded, kernel, rows, columns, cell.y, cell.x);
    for (int i = threadIdx.x; i < TILE * WEIGHTS; i += FOLD_THREADS) {
        const int n = i / WEIGHTS, y = cell.y + n / TILE_X, x = cell.x + n % TILE_X;
        if (y < cells_y && x < cells_x)
            out[((long long)y * cells_x + x) * WEIGHTS + i % WEIGHTS] =
                folded.weight[n][i % WEIGHTS];
    }
}

// The gradient of the source, gathered: a source pixel reads every cell with a window that contains
// it. Along an axis these cells are consecutive. If sizes double, there are seven, and the
// neighbour's cells begin one further. Else a pixel and its neighbour read the same cells, at most
// nine.
template <int WINDOW>
struct Readers {
    static constexpr int REACH = WINDOW == 7 ? 7 : 9;
    float weight[TILE][REACH][REACH][4];  // of pixel, reading cell's row and column, output 2 dy + dx
    // Of two pixels along an axis: the first reading cell, and where the cells' windows start.
    int first_y[TILE_Y / 2], first_x[TILE_X / 2];
    int start_y[TILE_Y / 2][REACH], start_x[TILE_X / 2][REACH];
};

static_assert(sizeof(Readers<7>) == 25280 && sizeof(Readers<8>) == 41712, "the launcher's numbers");

// Sums up for 2x2 pixels, the upper left being (y, x) of the source and (tile_y, tile_x) of the
// tile, in a lane's channels.
template <int WINDOW, bool FOURS>
static __device__ __forceinline__ void gather(
    const Readers<WINDOW>& readers, const Feature* __restrict__ grad_output,
    Feature* __restrict__ grad_source, int y, int x, int tile_y, int tile_x, Axis<WINDOW> rows,
    Axis<WINDOW> columns, int C, int c)
{
    constexpr int REACH = Readers<WINDOW>::REACH, APART = WINDOW == 7;
    const int top = 2 * readers.first_y[tile_y / 2], left = 2 * readers.first_x[tile_x / 2];
    float sum[QUAD][QUAD][CHANNELS] = {};
#pragma unroll 1
    for (int i = 0; i < 2 * (REACH + APART); i++) {
        // Outputs are clamped: those of cells beyond the map have weight zero.
        const int row = clamp(top + i, rows.output);
        const Feature* line = grad_output + (long long)row * columns.output * C + c;
        float value[REACH + APART][2][CHANNELS];
#pragma unroll
        for (int v = 0; v < 2 * (REACH + APART); v++) {
            const int column = clamp(left + v, columns.output);
            load_features<FOURS>(value[v / 2][v % 2], line + column * C, C - c);
        }
#pragma unroll
        for (int ky = 0; ky < QUAD; ky++) {
            const int u = i / 2 - ky * APART;
            if (u < 0 || u >= REACH)
                continue;
#pragma unroll
            for (int kx = 0; kx < QUAD; kx++) {
                const int pixel = (tile_y + ky) * TILE_X + tile_x + kx;
#pragma unroll
                for (int v = 0; v < REACH; v++)
#pragma unroll
                    for (int p = 0; p < 2; p++) {
                        const float weight = readers.weight[pixel][u][v][i % 2 * 2 + p];
#pragma unroll
                        for (int n = 0; n < CHANNELS; n++)
                            sum[ky][kx][n] += weight * value[kx * APART + v][p][n];
                    }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < QUAD * QUAD; k++)
        if (y + k / 2 < rows.source && x + k % 2 < columns.source)
            store_features<FOURS>(
                grad_source + ((long long)(y + k / 2) * columns.source + x + k % 2) * C + c,
                sum[k / 2][k % 2], C - c);
}

template <int WINDOW, bool FOURS>
static __device__ __forceinline__ void gather_tile(
    const Readers<WINDOW>& readers, const Feature* __restrict__ grad_output,
    Feature* __restrict__ grad_source, Corner corner, Axis<WINDOW> rows, Axis<WINDOW> columns,
    int C, int begin, int end)
{
    for (int c = begin + threadIdx.x % 32 * CHANNELS; c < end; c += 32 * CHANNELS)
#pragma unroll 1
        for (int n = threadIdx.x / 32; n < QUADS; n += SOURCE_THREADS / 32) {
            const int tile_y = n / QUADS_X * QUAD, tile_x = n % QUADS_X * QUAD;
            const int y = corner.y + tile_y, x = corner.x + tile_x;
            if (y < rows.source && x < columns.source)
                gather<WINDOW, FOURS>(readers, grad_output, grad_source, y, x, tile_y, tile_x, rows,
                                      columns, C, c);
        }
}

template <int WINDOW>
static __device__ __forceinline__ void backward_source(
    Readers<WINDOW>& readers, const Feature* __restrict__ grad_output,
    const float* __restrict__ folded, Feature* __restrict__ grad_source, Axis<WINDOW> rows,
    Axis<WINDOW> columns, int C, int span)
{
    constexpr int REACH = Readers<WINDOW>::REACH, APART = WINDOW == 7;
    const int cells_y = rows.cells(), cells_x = columns.cells();
    const Corner corner(columns.source);  // of source pixels here
    grad_output += (long long)blockIdx.z * rows.output * columns.output * C;
    grad_source += (long long)blockIdx.z * rows.source * columns.source * C;
    folded += (long long)blockIdx.z * cells_y * cells_x * WINDOW * WINDOW * 4;

    for (int n = threadIdx.x; n < (TILE_Y + TILE_X) / 2 * REACH; n += SOURCE_THREADS) {
        const int k = n / REACH, i = n % REACH, m = k - TILE_Y / 2;
        const bool vertical = m < 0;
        const Axis<WINDOW> axis = vertical ? rows : columns;
        const int at = vertical ? corner.y + 2 * k : corner.x + 2 * m;
        const int first = APART ? at - RADIUS : axis.first_reader(at);
        (vertical ? readers.start_y[k] : readers.start_x[m])[i] = axis.start(first + i);
        if (i == 0)
            (vertical ? readers.first_y[k] : readers.first_x[m]) = first;
    }
    __syncthreads();
    for (int n = threadIdx.x; n < TILE * REACH * REACH; n += SOURCE_THREADS) {
        const int pixel = n / (REACH * REACH), i = n / REACH % REACH, j = n % REACH;
        const int tile_y = pixel / TILE_X, tile_x = pixel % TILE_X;
        const int y = corner.y + tile_y, x = corner.x + tile_x;
        const int apart_y = tile_y % 2 * APART, apart_x = tile_x % 2 * APART;
        const int cell_y = readers.first_y[tile_y / 2] + apart_y + i;
        const int cell_x = readers.first_x[tile_x / 2] + apart_x + j;
        const int u = y - readers.start_y[tile_y / 2][i] - apart_y;
        const int v = x - readers.start_x[tile_x / 2][j] - apart_x;
        float weight[4] = {};
        if (y < rows.source && x < columns.source && 0 <= cell_y && cell_y < cells_y &&
            0 <= cell_x && cell_x < cells_x && 0 <= u && u < WINDOW && 0 <= v && v < WINDOW)
#pragma unroll
            for (int p = 0; p < 4; p++)
                weight[p] = folded[((((long long)cell_y * cells_x + cell_x) * WINDOW + u) * WINDOW +
                                    v) * 4 + p];
        store4(readers.weight[pixel][i][j], weight);
    }
    __syncthreads();

    const int begin = blockIdx.y * span, end = min(begin + span, C);
    if (in_fours(grad_output, C) && in_fours(grad_source, C))
        gather_tile<WINDOW, true>(
            readers, grad_output, grad_source, corner, rows, columns, C, begin, end);
    else
        gather_tile<WINDOW, false>(
            readers, grad_output, grad_source, corner, rows, columns, C, begin, end);
}

// The gradient of the kernels: dW(cell, m) = sum over channels of dout(cell) source(m), then the
// adjoint of folding. Both maps pass through shared memory, CHUNK channels at a time.
constexpr int CHUNK = 16;
constexpr int PITCH = CHUNK + 4;  // the vectors of eight neighbours are in different banks

template <int WINDOW>
struct Neighbourhood {
    static constexpr int APART = WINDOW == 7 ? 1 : 2;  // windows of neighbouring cells, at most
    static constexpr int ROWS = WINDOW + (TILE_Y - 1) * APART;
    static constexpr int COLUMNS = WINDOW + (TILE_X - 1) * APART;
    float source[ROWS][COLUMNS][PITCH];
    float grad[4][TILE][PITCH];
};

// Loads CHUNK channels of one pixel, zero where it does not exist; four channels a thread.
static __device__ __forceinline__ void load_chunk(
    float* to, const Feature* from, bool inside, bool fours, int channel, int C)
{
    float value[4] = {};
    if (inside && channel < C) {
        if (fours)
            load_features<true>(value, from + channel, C - channel);
        else
            load_features<false>(value, from + channel, C - channel);
    }
    store4(to, value);
}

// One thread: one cell times one row of its window, 4 outputs x WINDOW sums over channels.
template <int WINDOW>
static __device__ __forceinline__ void backward_kernel(
    float* shared, const Feature* __restrict__ source, const Feature* __restrict__ grad_output,
    float* __restrict__ grad_kernel, Axis<WINDOW> rows, Axis<WINDOW> columns, int C)
{
    using N = Neighbourhood<WINDOW>;
    static_assert(sizeof(N) <= sizeof(Folded<WINDOW>), "the maps fit where the weights will be");
    N& maps = *reinterpret_cast<N*>(shared);
    Folded<WINDOW>& folded = *reinterpret_cast<Folded<WINDOW>*>(shared);
    const int h = rows.source, w = columns.source, H = rows.output, W = columns.output;
    const Corner corner(columns.cells());
    source += (long long)blockIdx.z * h * w * C;
    grad_output += (long long)blockIdx.z * H * W * C;
    grad_kernel += (long long)blockIdx.z * H * W * TAPS;
    const bool fours = in_fours(source, C) && in_fours(grad_output, C);

    const int cell = threadIdx.x % TILE, u = threadIdx.x / TILE;
    const int top = rows.start(corner.y), left = columns.start(corner.x);
    const int row = rows.start(corner.y + cell / TILE_X) - top + u;
    const int column = columns.start(corner.x + cell % TILE_X) - left;
    float sum[4][WINDOW] = {};
    for (int c = 0; c < C; c += CHUNK) {
        for (int i = threadIdx.x; i < N::ROWS * N::COLUMNS * (CHUNK / 4); i += blockDim.x) {
            const int k = i % (CHUNK / 4) * 4, n = i / (CHUNK / 4);
            const int y = top + n / N::COLUMNS, x = left + n % N::COLUMNS;
            load_chunk(&maps.source[n / N::COLUMNS][n % N::COLUMNS][k],
                       source + ((long long)y * w + x) * C, 0 <= y && y < h && 0 <= x && x < w,
                       fours, c + k, C);
        }
        for (int i = threadIdx.x; i < 4 * TILE * (CHUNK / 4); i += blockDim.x) {
            const int k = i % (CHUNK / 4) * 4, n = i / (CHUNK / 4), p = n % 4;
            const int y = 2 * (corner.y + n / 4 / TILE_X) + p / 2;
            const int x = 2 * (corner.x + n / 4 % TILE_X) + p % 2;
            load_chunk(&maps.grad[p][n / 4][k], grad_output + ((long long)y * W + x) * C,
                       y < H && x < W, fours, c + k, C);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < CHUNK; k += 4) {
            float grad[4][4];
#pragma unroll
            for (int p = 0; p < 4; p++)
                load4(grad[p], &maps.grad[p][cell][k]);
#pragma unroll
            for (int v = 0; v < WINDOW; v++) {
                float value[4];
                load4(value, &maps.source[row][column + v][k]);
#pragma unroll
                for (int p = 0; p < 4; p++)
#pragma unroll
                    for (int n = 0; n < 4; n++)
                        sum[p][v] += grad[p][n] * value[n];
            }
        }
        __syncthreads();
    }
    prepare_operators(folded, rows, columns, corner.y, corner.x);
#pragma unroll
    for (int v = 0; v < WINDOW; v++)
#pragma unroll
        for (int p = 0; p < 4; p++)
            folded.of(cell, u, v)[p] = sum[p][v];
    store_taps(folded, grad_kernel, corner.y, corner.x, H, W);
}

#define BACKWARD(WINDOW)                                                                       \
    extern "C" __global__ void __launch_bounds__(FOLD_THREADS, 2) fold_##WINDOW(               \
        const float* __restrict__ kernel, float* __restrict__ folded, int h, int w, int H,     \
        int W)                                                                                 \
    {                                                                                          \
        extern __shared__ __align__(16) float shared[];                                        \
        fold<WINDOW>(*reinterpret_cast<Folded<WINDOW>*>(shared), kernel, folded, {h, H},       \
                     {w, W});                                                                  \
    }                                                                                          \
    extern "C" __global__ void __launch_bounds__(SOURCE_THREADS, 3)                            \
        apply_backward_source_##WINDOW(                                                        \
            const Feature* __restrict__ grad_output, const float* __restrict__ folded,         \
            Feature* __restrict__ grad_source, int h, int w, int H, int W, int C, int span)    \
    {                                                                                          \
        extern __shared__ __align__(16) float shared[];                                        \
        backward_source<WINDOW>(*reinterpret_cast<Readers<WINDOW>*>(shared), grad_output,      \
                                folded, grad_source, {h, H}, {w, W}, C, span);                 \
    }                                                                                          \
    extern "C" __global__ void __launch_bounds__(TILE * WINDOW, 2)                             \
        apply_backward_kernel_##WINDOW(                                                        \
            const Feature* __restrict__ source, const Feature* __restrict__ grad_output,       \
            float* __restrict__ grad_kernel, int h, int w, int H, int W, int C)                \
    {                                                                                          \
        extern __shared__ __align__(16) float shared[];                                        \
        backward_kernel<WINDOW>(shared, source, grad_output, grad_kernel, {h, H}, {w, W}, C);  \
    }

BACKWARD(7)
BACKWARD(8)
