// The adjoints of jbu_apply.cu: gradients of source and kernel.
//
// ABI: options and words as in jbu_apply.cu; W2 = 64 (_x1) or 49 (_x2).
//
//   fold_x1, _x2                   PP ii      kernel, out folded (B,cy,cx,W2,4), h, w
//       grid (ceil(cx/8)*ceil(cy/4), 1, B)             block 256  shared 38144 (_x1), 29792 (_x2)
//   apply_backward_source_x1, _x2  PPP iiii   grad_output, folded, out grad_source, h, w, C, span
//       grid (ceil(w/8)*ceil(h/4), ceil(C/span), B)    block 128  shared 8192 (_x1), 25088 (_x2)
//   apply_backward_kernel_x1, _x2  PPP iii    source, grad_output, out grad_kernel (B,H,W,49), h, w, C
//       grid (ceil(cx/8)*ceil(cy/4), 1, B)             block 256 (_x1), 224 (_x2)
//                                                      shared 38144 (_x1), 29792 (_x2)
//
// The gradient of bias is grad_output summed over B, H, W, which torch does as well.

#include "cell.cuh"

constexpr int FOLD_THREADS = 256, SOURCE_THREADS = 128;

template <int SCALE>
static __device__ __forceinline__ void fold(
    Folded<SCALE>& folded, const float* __restrict__ kernel, float* __restrict__ out, int h, int w)
{
    constexpr int WEIGHTS = Cell<SCALE>::WEIGHTS;
    const int H = SCALE * h, W = SCALE * w, cells_y = (H + 1) / 2, cells_x = (W + 1) / 2;
    const Corner cell(cells_x);
    kernel += (long long)blockIdx.z * H * W * TAPS;
    out += (long long)blockIdx.z * cells_y * cells_x * WEIGHTS * 4;
    load_weights(folded, kernel, 2 * cell.y, 2 * cell.x, h, w);
    for (int i = threadIdx.x; i < TILE * WEIGHTS * 4; i += FOLD_THREADS) {
        const int n = i / (WEIGHTS * 4), y = cell.y + n / TILE_X, x = cell.x + n % TILE_X;
        if (y < cells_y && x < cells_x)
            out[((long long)y * cells_x + x) * WEIGHTS * 4 + i % (WEIGHTS * 4)] =
                (&folded.weight[0][0][0][0])[i];
    }
}

extern "C" __global__ void __launch_bounds__(FOLD_THREADS, 2) fold_x1(
    const float* __restrict__ kernel, float* __restrict__ folded, int h, int w)
{
    extern __shared__ __align__(16) float shared[];
    fold(*reinterpret_cast<Folded<1>*>(shared), kernel, folded, h, w);
}

extern "C" __global__ void __launch_bounds__(FOLD_THREADS, 2) fold_x2(
    const float* __restrict__ kernel, float* __restrict__ folded, int h, int w)
{
    extern __shared__ __align__(16) float shared[];
    fold(*reinterpret_cast<Folded<2>*>(shared), kernel, folded, h, w);
}

// The gradient of the source, gathered: a source pixel asks every cell whose window it is in. Along
// an axis these are cells first(m), first(m) + 1, ... REACH of them; the pixel after an even one
// starts one further on.
template <int SCALE>
struct Readers {
    static constexpr int REACH = SCALE == 2 ? 7 : 4;
    static __device__ int first(int at) { return SCALE == 2 ? at - RADIUS : (at - RADIUS) >> 1; }

    float weight[TILE][REACH][REACH][4];  // of pixel, reading cell's row and column, output 2 dy + dx
};

// Sums up for 2x2 pixels, the upper left being (y, x) of the source and (tile_y, tile_x) of the
// tile, in a lane's channels.
template <int SCALE, bool FOURS>
static __device__ __forceinline__ void gather(
    const Readers<SCALE>& readers, const Feature* __restrict__ grad_output,
    Feature* __restrict__ grad_source, int y, int x, int tile_y, int tile_x, int h, int w, int C,
    int c)
{
    constexpr int REACH = Readers<SCALE>::REACH;
    const int H = SCALE * h, W = SCALE * w;
    float sum[QUAD][QUAD][CHANNELS] = {};
#pragma unroll 1
    for (int i = 0; i < 2 * (REACH + 1); i++) {
        // Outputs are clamped: those of cells beyond the map have weight zero.
        const int row = clamp(2 * Readers<SCALE>::first(y) + i, H);
        const Feature* line = grad_output + (long long)row * W * C + c;
        float value[REACH + 1][2][CHANNELS];
#pragma unroll
        for (int v = 0; v < 2 * (REACH + 1); v++) {
            const int column = clamp(2 * Readers<SCALE>::first(x) + v, W);
            load_features<FOURS>(value[v / 2][v % 2], line + column * C, C - c);
        }
#pragma unroll
        for (int ky = 0; ky < QUAD; ky++) {
            const int u = i / 2 - ky;
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
                            sum[ky][kx][n] += weight * value[kx + v][p][n];
                    }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < QUAD * QUAD; k++)
        if (y + k / 2 < h && x + k % 2 < w)
            store_features<FOURS>(
                grad_source + ((long long)(y + k / 2) * w + x + k % 2) * C + c, sum[k / 2][k % 2],
                C - c);
}

template <int SCALE, bool FOURS>
static __device__ __forceinline__ void gather_tile(
    const Readers<SCALE>& readers, const Feature* __restrict__ grad_output,
    Feature* __restrict__ grad_source, Corner corner, int h, int w, int C, int begin, int end)
{
    for (int c = begin + threadIdx.x % 32 * CHANNELS; c < end; c += 32 * CHANNELS)
#pragma unroll 1
        for (int n = threadIdx.x / 32; n < QUADS; n += SOURCE_THREADS / 32) {
            const int tile_y = n / QUADS_X * QUAD, tile_x = n % QUADS_X * QUAD;
            const int y = corner.y + tile_y, x = corner.x + tile_x;
            if (y < h && x < w)
                gather<SCALE, FOURS>(
                    readers, grad_output, grad_source, y, x, tile_y, tile_x, h, w, C, c);
        }
}

template <int SCALE>
static __device__ __forceinline__ void backward_source(
    Readers<SCALE>& readers, const Feature* __restrict__ grad_output,
    const float* __restrict__ folded, Feature* __restrict__ grad_source, int h, int w, int C,
    int span)
{
    constexpr int WINDOW = Cell<SCALE>::WINDOW, STEP = Cell<SCALE>::STEP;
    constexpr int REACH = Readers<SCALE>::REACH;
    const int H = SCALE * h, W = SCALE * w, cells_y = (H + 1) / 2, cells_x = (W + 1) / 2;
    const Corner corner(w);  // of source pixels here
    grad_output += (long long)blockIdx.z * H * W * C;
    grad_source += (long long)blockIdx.z * h * w * C;
    folded += (long long)blockIdx.z * cells_y * cells_x * WINDOW * WINDOW * 4;

    for (int n = threadIdx.x; n < TILE * REACH * REACH; n += SOURCE_THREADS) {
        const int pixel = n / (REACH * REACH), i = n / REACH % REACH, j = n % REACH;
        const int y = corner.y + pixel / TILE_X, x = corner.x + pixel % TILE_X;
        const int cell_y = Readers<SCALE>::first(y) + i, cell_x = Readers<SCALE>::first(x) + j;
        const int u = y + RADIUS - STEP * cell_y, v = x + RADIUS - STEP * cell_x;
        float weight[4] = {};
        if (y < h && x < w && 0 <= cell_y && cell_y < cells_y && 0 <= cell_x && cell_x < cells_x)
#pragma unroll
            for (int p = 0; p < 4; p++)
                weight[p] = folded[((((long long)cell_y * cells_x + cell_x) * WINDOW + u) * WINDOW +
                                    v) * 4 + p];
        store4(readers.weight[pixel][i][j], weight);
    }
    __syncthreads();

    const int begin = blockIdx.y * span, end = min(begin + span, C);
    if (in_fours(grad_output, C) && in_fours(grad_source, C))
        gather_tile<SCALE, true>(readers, grad_output, grad_source, corner, h, w, C, begin, end);
    else
        gather_tile<SCALE, false>(readers, grad_output, grad_source, corner, h, w, C, begin, end);
}

static_assert(sizeof(Readers<1>) == 8192 && sizeof(Readers<2>) == 25088, "the launcher's numbers");

extern "C" __global__ void __launch_bounds__(SOURCE_THREADS, 3) apply_backward_source_x1(
    const Feature* __restrict__ grad_output, const float* __restrict__ folded,
    Feature* __restrict__ grad_source, int h, int w, int C, int span)
{
    extern __shared__ __align__(16) float shared[];
    backward_source(
        *reinterpret_cast<Readers<1>*>(shared), grad_output, folded, grad_source, h, w, C, span);
}

extern "C" __global__ void __launch_bounds__(SOURCE_THREADS, 3) apply_backward_source_x2(
    const Feature* __restrict__ grad_output, const float* __restrict__ folded,
    Feature* __restrict__ grad_source, int h, int w, int C, int span)
{
    extern __shared__ __align__(16) float shared[];
    backward_source(
        *reinterpret_cast<Readers<2>*>(shared), grad_output, folded, grad_source, h, w, C, span);
}

// The gradient of the kernels: dW(cell, m) = sum over channels of dout(cell) source(m), then the
// adjoint of folding. Both maps pass through shared memory, CHUNK channels at a time.
constexpr int CHUNK = 16;
constexpr int PITCH = CHUNK + 4;  // eight neighbours' vectors lie in different banks

template <int SCALE>
struct Neighbourhood {
    static constexpr int ROWS = Cell<SCALE>::WINDOW + (TILE_Y - 1) * Cell<SCALE>::STEP;
    static constexpr int COLUMNS = Cell<SCALE>::WINDOW + (TILE_X - 1) * Cell<SCALE>::STEP;
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
template <int SCALE>
static __device__ __forceinline__ void backward_kernel(
    float* shared, const Feature* __restrict__ source, const Feature* __restrict__ grad_output,
    float* __restrict__ grad_kernel, int h, int w, int C)
{
    using N = Neighbourhood<SCALE>;
    constexpr int WINDOW = Cell<SCALE>::WINDOW, STEP = Cell<SCALE>::STEP;
    static_assert(sizeof(N) <= sizeof(Folded<SCALE>), "the maps fit where the weights will be");
    N& maps = *reinterpret_cast<N*>(shared);
    Folded<SCALE>& folded = *reinterpret_cast<Folded<SCALE>*>(shared);
    const int H = SCALE * h, W = SCALE * w;
    const Corner corner((W + 1) / 2);
    source += (long long)blockIdx.z * h * w * C;
    grad_output += (long long)blockIdx.z * H * W * C;
    grad_kernel += (long long)blockIdx.z * H * W * TAPS;
    const bool fours = in_fours(source, C) && in_fours(grad_output, C);

    const int cell = threadIdx.x % TILE, u = threadIdx.x / TILE;
    const int cell_y = cell / TILE_X, cell_x = cell % TILE_X;
    float sum[4][WINDOW] = {};
    for (int c = 0; c < C; c += CHUNK) {
        for (int i = threadIdx.x; i < N::ROWS * N::COLUMNS * (CHUNK / 4); i += blockDim.x) {
            const int k = i % (CHUNK / 4) * 4, n = i / (CHUNK / 4);
            const int row = n / N::COLUMNS, column = n % N::COLUMNS;
            const int y = corner.y * STEP - RADIUS + row, x = corner.x * STEP - RADIUS + column;
            load_chunk(&maps.source[row][column][k], source + ((long long)y * w + x) * C,
                       0 <= y && y < h && 0 <= x && x < w, fours, c + k, C);
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
                load4(value, &maps.source[cell_y * STEP + u][cell_x * STEP + v][k]);
#pragma unroll
                for (int p = 0; p < 4; p++)
#pragma unroll
                    for (int n = 0; n < 4; n++)
                        sum[p][v] += grad[p][n] * value[n];
            }
        }
        __syncthreads();
    }
    prepare_operators<SCALE>(folded, 2 * corner.y, 2 * corner.x, h, w);
#pragma unroll
    for (int v = 0; v < WINDOW; v++)
#pragma unroll
        for (int p = 0; p < 4; p++)
            folded.weight[cell][u][v][p] = sum[p][v];
    store_taps(folded, grad_kernel, 2 * corner.y, 2 * corner.x, h, w);
}

extern "C" __global__ void __launch_bounds__(TILE * Cell<1>::WINDOW, 2) apply_backward_kernel_x1(
    const Feature* __restrict__ source, const Feature* __restrict__ grad_output,
    float* __restrict__ grad_kernel, int h, int w, int C)
{
    extern __shared__ __align__(16) float shared[];
    backward_kernel<1>(shared, source, grad_output, grad_kernel, h, w, C);
}

extern "C" __global__ void __launch_bounds__(TILE * Cell<2>::WINDOW, 2) apply_backward_kernel_x2(
    const Feature* __restrict__ source, const Feature* __restrict__ grad_output,
    float* __restrict__ grad_kernel, int h, int w, int C)
{
    extern __shared__ __align__(16) float shared[];
    backward_kernel<2>(shared, source, grad_output, grad_kernel, h, w, C);
}
