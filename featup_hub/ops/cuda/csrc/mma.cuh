// Doubling on tensor cores: features of half precision from sm_80 on, float32 where TF32 is fast.
//
// The four cells of a quad are one matrix product: 32 channels (M, in two halves) times the 8x8
// source positions that their windows span (K) times 16 outputs (N, those of the left and of the
// right cells). 49 of 64 products are useful; the others have weight zero. Sums are float32.
//
// A weight is split into two numbers of the operands' type, w = high + low. These keep 16 bits with
// bfloat16 and 22 with float16 (fewer of weights below 1e-4), less error than rounding the result.
// Float32 features are split, too: low high + high low + high high in TF32 keeps 21 bits. If a sum
// is not finite (a feature is not, or a weight exceeds float16), the quad is filtered again without
// tensor cores. Infinity then reaches only pixels with taps that read it.
// Only the weights pass through shared memory. A lane loads four consecutive channels of two source
// rows, and stores the same four channels of four neighbouring pixels.
#pragma once

#include "cell.cuh"
#include "tf32.cuh"

constexpr int MMA_COLUMNS = JBU_TYPE == 0 ? 1 : 2;    // of the 8x8 source positions, in a step
constexpr int MMA_STEPS = 8 / MMA_COLUMNS;
constexpr int MMA_CHANNELS = 32;

#if JBU_TYPE == 0
// A lane's part of a right operand: weights of two source rows, split.
static __device__ __forceinline__ Pair split_weights(const float (&weight)[2][1])
{
    return split(weight[0][0], weight[1][0]);
}

// Adds a step's products, for channels 2 m and 2 m + 1 of the lane's four.
static __device__ __forceinline__ void add_products(
    float (&sum)[QUAD][4], const Features (&value)[2][1], const Pair (&weight)[QUAD], int m,
    int step)
{
    const float* row[2] = {value[0][0].channel + 2 * m, value[1][0].channel + 2 * m};
    const float x[4] = {row[0][0], row[1][0], row[0][1], row[1][1]};
    unsigned high[4], low[4];
    // The compiler cannot know that blockDim.y is 1. It knows that products ignore what is cut, and
    // would, to save the cutting, move operands into place once per product.
    split(high, low, x, blockDim.y * TF32);
#pragma unroll
    for (int kx = 0; kx < QUAD; kx++)
        if (kx <= step && step < kx + DIAMETER) {
            multiply_tf32(sum[kx], low, weight[kx].high);
            multiply_tf32(sum[kx], high, weight[kx].low);
            multiply_tf32(sum[kx], high, weight[kx].high);
        }
}
#else
static __device__ __forceinline__ Pair split_weights(const float (&weight)[2][2])
{
    constexpr auto narrow_pair = JBU_TYPE == 2 ? floats_to_bfloats : floats_to_halfs;
    Pair pair;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const float a = weight[j][0], b = weight[j][1];
        const unsigned high = pair.high[j] = narrow_pair(a, b);
        pair.low[j] = narrow_pair(a - widen((Feature)high), b - widen((Feature)(high >> 16)));
    }
    return pair;
}

static __device__ __forceinline__ void add_products(
    float (&sum)[QUAD][4], const Features (&value)[2][2], const Pair (&weight)[QUAD], int m, int)
{
    constexpr auto multiply = JBU_TYPE == 2 ? multiply_bfloats : multiply_halfs;
    unsigned x[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const Features* row = value[r / 2];
        x[r] = row[0].channel[2 * m + r % 2] | (unsigned)row[1].channel[2 * m + r % 2] << 16;
    }
#pragma unroll
    for (int kx = 0; kx < QUAD; kx++) {
        multiply(sum[kx], x, weight[kx].low);
        multiply(sum[kx], x, weight[kx].high);
    }
}
#endif

// A lane's weights of a quad: outputs of the left and of the right cells (kx).
struct Weights {
    Pair pair[MMA_STEPS][QUAD];

    __device__ __forceinline__ Weights(const Folded<7>& folded, int tile_y, int tile_x)
    {
        const int row = threadIdx.x % 4, ky = threadIdx.x % 32 / 16, output = threadIdx.x / 4 % 4;
#pragma unroll
        for (int step = 0; step < MMA_STEPS; step++)
#pragma unroll
            for (int kx = 0; kx < QUAD; kx++) {
                float weight[2][MMA_COLUMNS] = {};
#pragma unroll
                for (int j = 0; j < 2 * MMA_COLUMNS; j++) {
                    const int u = row + j % 2 * 4 - ky, v = MMA_COLUMNS * step + j / 2 - kx;
                    if (0 <= u && u < DIAMETER && 0 <= v && v < DIAMETER)
                        weight[j % 2][j / 2] =
                            folded.of((tile_y + ky) * TILE_X + tile_x + kx, u, v)[output];
                }
                pair[step][kx] = split_weights(weight);
            }
    }
};

// The address some pixels further. One instruction, because the product has 64 bits.
template <class T>
static __device__ __forceinline__ T* further(T* from, unsigned pixels, unsigned bytes)
{
    return (T*)((char*)from + (unsigned long long)pixels * bytes);
}

// Filters a quad, the upper left cell being (cell_y, cell_x), in channels base, ... base + 31.
// Returns whether all of the lane's sums are finite.
template <bool FOURS>
static __device__ __forceinline__ bool filter_channels(
    const Weights& weights, const Maps& maps, int cell_y, unsigned cell_x, int base)
{
    const int h = maps.h, w = maps.w, C = maps.C;
    unsigned bytes = C * sizeof(Feature);    // of a pixel; its upper 32 bits shall not be kept
    opaque(bytes);
    const int row = threadIdx.x % 4, c = base + threadIdx.x % 32 / 4 * 4;
    // Rows and columns are clamped: weights are zero beyond the border. So are channels: what is
    // computed beyond C is not stored. Columns are clamped anew each time, to save registers.
    const int loaded = FOURS ? min(c, C - 4) : c;
    float sum[2][QUAD][4];  // of channels 2 m + i, [m][kx][2 i + dx]
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float start = maps.bias ? maps.bias[FOURS ? loaded + k : min(c + k, C - 1)] : 0.f;
#pragma unroll
        for (int kx = 0; kx < QUAD; kx++)
            sum[k / 2][kx][k % 2 * 2] = sum[k / 2][kx][k % 2 * 2 + 1] = start;
    }
    const Feature* line[2];
#pragma unroll
    for (int j = 0; j < 2; j++)
        line[j] = maps.source + (long long)clamp(cell_y - RADIUS + row + 4 * j, h) * w * C + loaded;
    opaque(cell_x);
#pragma unroll
    for (int step = 0; step < MMA_STEPS; step++) {
        Features value[2][MMA_COLUMNS];
#pragma unroll
        for (int j = 0; j < 2 * MMA_COLUMNS; j++) {
            const int x = clamp(cell_x - RADIUS + MMA_COLUMNS * step + j / 2, w);
            value[j % 2][j / 2] = load_four<FOURS>(further(line[j % 2], x, bytes), C - c);
        }
#pragma unroll
        for (int m = 0; m < 2; m++)
            add_products(sum[m], value, weights.pair[step], m, step);
    }
    float check = 0.f;
#pragma unroll
    for (int k = 0; k < 16; k++)
        check += 0.f * sum[k / 8][k / 4 % 2][k % 4];
    const int y = 2 * cell_y + row;
    Feature* to = maps.output + ((long long)y * w + cell_x) * 2 * C + c;
    if (y < 2 * h && c < C)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int kx = k / 2, dx = k % 2;
            const float four[4] = {
                sum[0][kx][dx], sum[0][kx][2 + dx], sum[1][kx][dx], sum[1][kx][2 + dx]};
            if (cell_x + kx < w)
                store_features<FOURS>(further(to, k, bytes), four, C - c);
        }
    return check == 0.f;
}
