// Source filtered with one 7x7 kernel per pixel. Matches reference.jbu_apply; adjoints next door.
//
//   out(u) = sum_t k_t(u) mirror(bicubic(source))(u + t) + bias
//          = sum_m W_m(u) source(m) + bias,   W = A_y^T k A_x   (cell.cuh)
//
// A block loads the kernels of a tile of 8x4 cells, folds them in shared memory and serves all its
// channels with them. Nothing of the source is staged: its neighbourhood lives in the L1 cache.
// Half-precision features are doubled on tensor cores where there are any (mma.cuh).
//
// ABI (this file and jbu_apply_backward.cu)
//
// Options: -DJBU_TYPE=0|1|2 (features float32, float16, bfloat16), --std=c++17, no fast math.
// -DJBU_TENSOR_CORES=0 does without them, for comparison.
// Headers by name: device.cuh, ptx.cuh, features.cuh, cell.cuh, mma.cuh. Features ("source", "output" and
// their gradients) are of that type, contiguous in channels_last order: (B,H,W,C) in memory.
// kernel, bias and folded are float32. Any C, any size >= 1, any alignment; vectors of four
// channels are moved where C % 4 == 0 and the address allows. B <= 65535.
// Names end in _x2 where (H,W) = (2h,2w), in _x1 where (H,W) = (h,w); for any other ratio resize
// the source bicubically first and take _x1. h, w are always the source's size.
// cells: cy = ceil(H/2), cx = ceil(W/2). Nothing needs to be zeroed. Letters as driver.Signature.
//
//   apply_forward_x1, _x2    PPPP iiii   source, kernel (B,H,W,49), bias (C) or null, out output,
//                                        h, w, C, span
//       grid (ceil(cx/8)*ceil(cy/4), ceil(C/span), B)    block 128    shared 38144 (_x1), 29792 (_x2)
//       span: channels of a block, a multiple of 128. Every block folds anew, but few blocks leave
//       a GPU idle: spans = clamp(ceil(4*SMs/(grid.x*B)), 1, ceil(C/128)),
//       span = 128*ceil(ceil(C/128)/spans). The result does not depend on it.

#include "cell.cuh"
#include "mma.cuh"

// Whether to double on tensor cores.
#ifndef JBU_TENSOR_CORES
#define JBU_TENSOR_CORES (JBU_TYPE != 0 && __CUDA_ARCH__ >= 800)
#endif

constexpr int THREADS = 128;
static_assert(sizeof(Folded<1>) == 38144 && sizeof(Folded<2>) == 29792, "the launcher's numbers");

// The maps of one image.
struct Maps {
    const Feature* source;
    const float* bias;
    Feature* output;
    int h, w, C;
};

// Filters 2x2 cells, the upper left being (cell_y, cell_x) of the image and (tile_y, tile_x) of the
// tile, in a lane's channels c, c + 1, ...
template <int SCALE, bool FOURS>
static __device__ __forceinline__ void filter(
    const Folded<SCALE>& folded, const Maps& maps, int cell_y, int cell_x, int tile_y, int tile_x,
    int c)
{
    constexpr int WINDOW = Cell<SCALE>::WINDOW, STEP = Cell<SCALE>::STEP;
    constexpr int SPAN = WINDOW + STEP;  // of the windows of two cells side by side
    const int C = maps.C;

    int column[SPAN];  // clamped: beyond the border, weights are zero
#pragma unroll
    for (int v = 0; v < SPAN; v++)
        column[v] = clamp(cell_x * STEP - RADIUS + v, maps.w) * C;

    float sum[QUAD][QUAD][4][CHANNELS];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        const float bias = maps.bias ? maps.bias[min(c + i, C - 1)] : 0.f;
#pragma unroll
        for (int k = 0; k < QUAD * QUAD * 4; k++)
            sum[k / 8][k / 4 % 2][k % 4][i] = bias;
    }
#pragma unroll 1
    for (int row = 0; row < SPAN; row++) {
        const int y = clamp(cell_y * STEP - RADIUS + row, maps.h);
        const Feature* line = maps.source + (long long)y * maps.w * C + c;
        float value[SPAN][CHANNELS];
#pragma unroll
        for (int v = 0; v < SPAN; v++)
            load_features<FOURS>(value[v], line + column[v], C - c);
#pragma unroll
        for (int ky = 0; ky < QUAD; ky++) {
            const int u = row - ky * STEP;
            if (u < 0 || u >= WINDOW)
                continue;
#pragma unroll
            for (int kx = 0; kx < QUAD; kx++) {
                const int cell = (tile_y + ky) * TILE_X + tile_x + kx;
#pragma unroll
                for (int v = 0; v < WINDOW; v++) {
                    float weight[4];
                    load4(weight, folded.weight[cell][u][v]);
#pragma unroll
                    for (int p = 0; p < 4; p++)
#pragma unroll
                        for (int i = 0; i < CHANNELS; i++)
                            sum[ky][kx][p][i] += weight[p] * value[kx * STEP + v][i];
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < QUAD * QUAD * 4; k++) {
        const int y = 2 * (cell_y + k / 8) + k % 4 / 2, x = 2 * (cell_x + k / 4 % 2) + k % 2;
        if (y < SCALE * maps.h && x < SCALE * maps.w)
            store_features<FOURS>(
                maps.output + ((long long)y * SCALE * maps.w + x) * C + c,
                sum[k / 8][k / 4 % 2][k % 4], C - c);
    }
}

template <int SCALE, bool FOURS>
static __device__ __forceinline__ void filter_tile(
    const Folded<SCALE>& folded, const Maps& maps, Corner cell, int begin, int end)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int c = begin + lane * CHANNELS; c < end; c += 32 * CHANNELS)
#pragma unroll 1
        for (int quad = warp; quad < QUADS; quad += THREADS / 32) {
            const int y = quad / QUADS_X * QUAD, x = quad % QUADS_X * QUAD;
            if (2 * (cell.y + y) >= SCALE * maps.h || 2 * (cell.x + x) >= SCALE * maps.w)
                continue;
            filter<SCALE, FOURS>(folded, maps, cell.y + y, cell.x + x, y, x, c);
        }
}

#if JBU_TENSOR_CORES
// The same on tensor cores; weights stay in registers while channels pass.
static __device__ __forceinline__ void double_tile(
    const Folded<2>& folded, const Maps& maps, Corner cell, int begin, int end)
{
#pragma unroll 1
    for (int quad = threadIdx.x / 32; quad < QUADS; quad += THREADS / 32) {
        const int tile_y = quad / QUADS_X * QUAD, tile_x = quad % QUADS_X * QUAD;
        const int y = cell.y + tile_y, x = cell.x + tile_x;
        if (y >= maps.h || x >= maps.w)
            continue;
        const Fragments weights(folded, tile_y, tile_x);
#pragma unroll 1
        for (int c = begin; c < end; c += MMA_CHANNELS)
            filter_channels(
                weights, maps.source, maps.bias, maps.output, y, x, maps.h, maps.w, maps.C, c);
    }
}
#endif

template <int SCALE>
static __device__ __forceinline__ void apply(
    Folded<SCALE>& folded, const float* __restrict__ kernel, Maps maps, int span)
{
    const int H = SCALE * maps.h, W = SCALE * maps.w;
    const Corner cell((W + 1) / 2);
    maps.source += (long long)blockIdx.z * maps.h * maps.w * maps.C;
    maps.output += (long long)blockIdx.z * H * W * maps.C;
    kernel += (long long)blockIdx.z * H * W * TAPS;
    load_weights(folded, kernel, 2 * cell.y, 2 * cell.x, maps.h, maps.w);

    const int begin = blockIdx.y * span, end = min(begin + span, maps.C);
#if JBU_TENSOR_CORES
    if constexpr (SCALE == 2)
        if (in_eights(maps.source, maps.C) && in_eights(maps.output, maps.C))
            return double_tile(folded, maps, cell, begin, end);
#endif
    if (in_fours(maps.source, maps.C) && in_fours(maps.output, maps.C))
        filter_tile<SCALE, true>(folded, maps, cell, begin, end);
    else
        filter_tile<SCALE, false>(folded, maps, cell, begin, end);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) apply_forward_x1(
    const Feature* __restrict__ source, const float* __restrict__ kernel,
    const float* __restrict__ bias, Feature* __restrict__ output, int h, int w, int C, int span)
{
    extern __shared__ __align__(16) float shared[];
    apply(*reinterpret_cast<Folded<1>*>(shared), kernel, Maps{source, bias, output, h, w, C}, span);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) apply_forward_x2(
    const Feature* __restrict__ source, const float* __restrict__ kernel,
    const float* __restrict__ bias, Feature* __restrict__ output, int h, int w, int C, int span)
{
    extern __shared__ __align__(16) float shared[];
    apply(*reinterpret_cast<Folded<2>*>(shared), kernel, Maps{source, bias, output, h, w, C}, span);
}
