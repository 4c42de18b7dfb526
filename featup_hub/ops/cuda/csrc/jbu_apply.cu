// Source filtered with one 7x7 kernel per pixel. Matches reference.jbu_apply; adjoints in
// jbu_apply_backward.cu.
//
//   out(u) = sum_t k_t(u) mirror(bicubic(source))(u + t) + bias
//          = sum_m W_m(u) source(m) + bias,   W = A_y^T k A_x   (cell.cuh)
//
// A block loads the kernels of a tile of 8x4 cells, folds them in shared memory and uses them for
// all its channels. The source is not staged in shared memory: the L1 cache holds it.
// Features are doubled on tensor cores where these are faster (mma.cuh).
//
// ABI (this file and jbu_apply_backward.cu)
//
// Options: -DJBU_TYPE=0|1|2 (features float32, float16, bfloat16), --std=c++17, no fast math.
// -DJBU_TENSOR_CORES=0 disables them, for comparison.
// Features ("source", "output" and their gradients) are of that type, contiguous in channels_last
// order: (B,H,W,C) in memory. kernel, bias and folded are float32. Any C, any size >= 1, any
// alignment; vectors of four channels are moved where C % 4 == 0 and the address allows. B <= 65535.
// Names end in _7 where (H,W) = (2h,2w), in _8 where each axis keeps its size or grows by 1.75 to 2;
// for any other ratio resize the source bicubically first and take _8 (cell.cuh, WINDOW).
// cells: cy = ceil(H/2), cx = ceil(W/2). No memory needs to be zeroed. Letters as driver.Signature.
//
//   apply_forward_7, _8      PPPP iiiiii source, kernel (B,H,W,49), bias (C) or null, out output,
//                                        h, w, H, W, C, span
//       grid (ceil(cx/8)*ceil(cy/4), ceil(C/span), B)    block 128    shared 29840 (_7), 38704 (_8)
//       span: channels of a block, a multiple of 128. Every block repeats the folding, but few
//       blocks leave a GPU idle: spans = clamp(ceil(4*SMs/(grid.x*B)), 1, ceil(C/128)),
//       span = 128*ceil(ceil(C/128)/spans). The result does not depend on it.

#include "cell.cuh"
#include "mma.cuh"

// Whether to double on tensor cores.
#ifndef JBU_TENSOR_CORES
#define JBU_TENSOR_CORES (JBU_TYPE == 0 ? FAST_TF32 : __CUDA_ARCH__ >= 800)
#endif

constexpr int THREADS = 128, WARPS = THREADS / 32;
static_assert(sizeof(Folded<7>) == 29840 && sizeof(Folded<8>) == 38704, "the launcher's numbers");

// Filters 2x2 cells, the upper left being (cell_y, cell_x) of the image and (tile_y, tile_x) of the
// tile, in a lane's channels c, c + 1, ...
template <int WINDOW, bool FOURS>
static __device__ __forceinline__ void filter(
    const Folded<WINDOW>& folded, const Maps& maps, int cell_y, int cell_x, int tile_y, int tile_x,
    int c)
{
    // If sizes double, two adjacent windows are one position apart and share their loads.
    constexpr bool SHARED = WINDOW == 7;
    constexpr int COLUMNS = WINDOW + SHARED;
    const int C = maps.C, top = folded.start_y[tile_y];
    const int below = SHARED ? 1 : folded.start_y[tile_y + 1] - top;

    int column[COLUMNS];  // clamped: beyond the border, weights are zero
#pragma unroll
    for (int v = 0; v < COLUMNS; v++)
        column[v] = clamp(folded.start_x[tile_x] + v, maps.w) * C;
    const int right = folded.start_x[tile_x + 1];

    float sum[QUAD][QUAD][4][CHANNELS];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        const float bias = maps.bias ? maps.bias[min(c + i, C - 1)] : 0.f;
#pragma unroll
        for (int k = 0; k < QUAD * QUAD * 4; k++)
            sum[k / 8][k / 4 % 2][k % 4][i] = bias;
    }
#pragma unroll 1
    for (int row = 0; row < WINDOW + below; row++) {
        const Feature* line = maps.source + (long long)clamp(top + row, maps.h) * maps.w * C + c;
        float value[COLUMNS][CHANNELS];
#pragma unroll
        for (int kx = 0; kx < QUAD; kx++) {
            if (kx == 0 || !SHARED)
#pragma unroll
                for (int v = 0; v < COLUMNS; v++)
                    load_features<FOURS>(
                        value[v], line + (kx ? clamp(right + v, maps.w) * C : column[v]), C - c);
#pragma unroll
            for (int ky = 0; ky < QUAD; ky++) {
                const int u = row - ky * below;
                if (u < 0 || u >= WINDOW)
                    continue;
                const float* cell = folded.of((tile_y + ky) * TILE_X + tile_x + kx, u, 0);
#pragma unroll
                for (int v = 0; v < WINDOW; v++) {
                    float weight[4];
                    load4(weight, cell + 4 * v);
#pragma unroll
                    for (int p = 0; p < 4; p++)
#pragma unroll
                        for (int i = 0; i < CHANNELS; i++)
                            sum[ky][kx][p][i] += weight[p] * value[(SHARED ? kx : 0) + v][i];
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < QUAD * QUAD * 4; k++) {
        const int y = 2 * (cell_y + k / 8) + k % 4 / 2, x = 2 * (cell_x + k / 4 % 2) + k % 2;
        if (y < maps.H && x < maps.W)
            store_features<FOURS>(maps.output + ((long long)y * maps.W + x) * C + c,
                                  sum[k / 8][k / 4 % 2][k % 4], C - c);
    }
}

// The bit of a warp's quad and of 128 channels: all but maps of many channels have one each.
static __device__ __forceinline__ unsigned bit_of(int quad, int c)
{
    return 1u << (quad / WARPS * 16 + c / (32 * CHANNELS) % 16);
}

#if JBU_TENSOR_CORES
// Doubles the tile on tensor cores, weights in registers. Returns the bits of what is not finite.
template <bool FOURS>
static __device__ __forceinline__ unsigned double_tile(
    const Folded<7>& folded, const Maps& maps, Corner cell, int begin, int end)
{
    unsigned failed = 0;
#pragma unroll 1
    for (int quad = threadIdx.x / 32; quad < QUADS; quad += WARPS) {
        const int tile_y = quad / QUADS_X * QUAD, tile_x = quad % QUADS_X * QUAD;
        const int y = cell.y + tile_y, x = cell.x + tile_x;
        if (y >= maps.h || x >= maps.w)
            continue;
        const Weights weights(folded, tile_y, tile_x);
#pragma unroll 1
        for (int c = begin; c < end; c += MMA_CHANNELS)
            if (!__all_sync(0xffffffff, filter_channels<FOURS>(weights, maps, y, x, c)))
                failed |= bit_of(quad, c);
    }
    __syncwarp(~0u);  // a vote orders no memory, and other lanes may store the same again
    return failed;
}
#endif

// Filters the quads of the tile in the block's channels.
template <int WINDOW, bool FOURS>
static __device__ __forceinline__ void filter_tile(
    const Folded<WINDOW>& folded, const Maps& maps, Corner cell, int begin, int end)
{
    unsigned open = ~0u;
#if JBU_TENSOR_CORES
    if constexpr (WINDOW == 7)
        open = double_tile<FOURS>(folded, maps, cell, begin, end);
#endif
    for (int c = begin + threadIdx.x % 32 * CHANNELS; c < end; c += 32 * CHANNELS)
#pragma unroll 1
        for (int quad = threadIdx.x / 32; quad < QUADS; quad += WARPS) {
            const int tile_y = quad / QUADS_X * QUAD, tile_x = quad % QUADS_X * QUAD;
            const int y = cell.y + tile_y, x = cell.x + tile_x;
            if (open & bit_of(quad, c) && 2 * y < maps.H && 2 * x < maps.W)
                filter<WINDOW, FOURS>(folded, maps, y, x, tile_y, tile_x, c);
        }
}

template <int WINDOW>
static __device__ __forceinline__ void apply(
    Folded<WINDOW>& folded, const float* __restrict__ kernel, Maps maps, int span)
{
    const Corner cell((maps.W + 1) / 2);
    maps.source += (long long)blockIdx.z * maps.h * maps.w * maps.C;
    maps.output += (long long)blockIdx.z * maps.H * maps.W * maps.C;
    kernel += (long long)blockIdx.z * maps.H * maps.W * TAPS;
    load_weights<WINDOW>(folded, kernel, {maps.h, maps.H}, {maps.w, maps.W}, cell.y, cell.x);

    const int begin = blockIdx.y * span, end = min(begin + span, maps.C);
    if (in_fours(maps.source, maps.C) && in_fours(maps.output, maps.C))
        filter_tile<WINDOW, true>(folded, maps, cell, begin, end);
    else
        filter_tile<WINDOW, false>(folded, maps, cell, begin, end);
}

#define APPLY_FORWARD(WINDOW)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, WINDOW == 7 ? 3 : 2)                 \
    apply_forward_##WINDOW(                                                                    \
        const Feature* __restrict__ source, const float* __restrict__ kernel,                  \
        const float* __restrict__ bias, Feature* __restrict__ output, int h, int w, int H,     \
        int W, int C, int span)                                                                \
    {                                                                                          \
        extern __shared__ __align__(16) float shared[];                                        \
        apply(*reinterpret_cast<Folded<WINDOW>*>(shared), kernel,                              \
              Maps{source, bias, output, h, w, H, W, C}, span);                                \
    }

APPLY_FORWARD(7)
APPLY_FORWARD(8)
