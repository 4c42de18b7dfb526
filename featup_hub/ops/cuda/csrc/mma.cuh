// Doubling of half-precision features on tensor cores, from sm_80 on.
//
// The four cells of a quad are one matrix product: 16 outputs (M) times the 8x8 source positions
// that their windows span (K) times 32 channels (N). 49 of 64 products are useful; the others have
// weight zero. Sums are float32. A weight is split into two numbers of the features' type, w = high
// + low. These keep 16 bits with bfloat16 and 22 with float16, so the error is below the rounding
// of the result. If a sum is not finite (a feature is not, or a weight exceeds float16), the quad
// is filtered again without tensor cores. Infinity then reaches only pixels with taps that read it.
//
// Only the weights pass through shared memory. Columns of a product may be any channels; they are
// assigned so that a lane loads four consecutive channels and stores eight.
#pragma once

#include "cell.cuh"

static __device__ __forceinline__ unsigned narrow_pair(float low, float high)
{
#if JBU_TYPE == 2
    return floats_to_bfloats(low, high);
#else
    return floats_to_halfs(low, high);
#endif
}

static __device__ __forceinline__ void multiply(
    float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
#if JBU_TYPE == 2
    multiply_bfloats(sum, a, b);
#else
    multiply_halfs(sum, a, b);
#endif
}

// Whether eight channels of every pixel can be moved at once; no other maps are taken.
static __device__ __forceinline__ bool in_eights(const void* features, int channels)
{
    return channels % 8 == 0 && (unsigned long long)features % (8 * sizeof(Feature)) == 0;
}

constexpr int MMA_STEPS = 4;      // of 16 source positions: two rows of the quad's 8x8
constexpr int MMA_COLUMNS = 4;    // products side by side, of 8 channels each
constexpr int MMA_CHANNELS = 8 * MMA_COLUMNS;

// A lane's share of a quad's weights. Register r of a step: outputs of the quad's row of cells
// r % 2, source row 2 step + r / 2 of the 8x8.
struct Fragments {
    unsigned high[MMA_STEPS][4], low[MMA_STEPS][4];

    __device__ __forceinline__ Fragments(const Folded<7>& folded, int tile_y, int tile_x)
    {
        const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        const int kx = group / 4, output = group % 4;
#pragma unroll
        for (int step = 0; step < MMA_STEPS; step++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const int ky = r % 2, u = 2 * step + r / 2 - ky;
                float weight[2] = {};
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int v = pair + i - kx;
                    if (0 <= u && u < DIAMETER && 0 <= v && v < DIAMETER)
                        weight[i] =
                            folded.of((tile_y + ky) * TILE_X + tile_x + kx, u, v)[output];
                }
                const unsigned rounded = narrow_pair(weight[0], weight[1]);
                high[step][r] = rounded;
                low[step][r] = narrow_pair(
                    weight[0] - widen((Feature)rounded), weight[1] - widen((Feature)(rounded >> 16)));
            }
    }
};

// Two words of four channels, four of eight.
template <int WORDS>
struct __align__(4 * WORDS) Pairs {
    unsigned pair[WORDS];
};

// Filters a quad, the upper left cell being (cell_y, cell_x), in channels base, ... base + 31.
// Column `col` of product n is channel base + 4 col + n: a lane loads one column of all products
// and stores two that follow one another. Returns whether all of the lane's sums are finite.
static __device__ __forceinline__ bool filter_channels(
    const Fragments& weights, const Feature* source, const float* bias, Feature* output, int cell_y,
    int cell_x, int h, int w, int C, int base)
{
    const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    const int stored = base + 4 * pair;
    float sum[MMA_COLUMNS][4];  // of outputs group and group + 8 (r), columns pair and pair + 1 (i)
#pragma unroll
    for (int n = 0; n < MMA_COLUMNS; n++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            sum[n][i] = sum[n][2 + i] = bias && stored < C ? bias[stored + 4 * i + n] : 0.f;

    // Rows and columns are clamped: weights are zero beyond the border. So are channels: what is
    // computed beyond C is not stored.
    const Feature* line = source + (long long)clamp(cell_y - RADIUS, h) * w * C +
                          min(base + 4 * group, C - 4);
    const int left = clamp(cell_x - RADIUS + pair, w) * C;
    const int right = clamp(cell_x - RADIUS + pair + 1, w) * C;
#pragma unroll
    for (int step = 0; step < MMA_STEPS; step++) {
        Pairs<2> value[2][2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int y = cell_y - RADIUS + 2 * step + r;
            value[r][0] = *reinterpret_cast<const Pairs<2>*>(line + left);
            value[r][1] = *reinterpret_cast<const Pairs<2>*>(line + right);
            line += 0 <= y && y + 1 < h ? w * C : 0;
        }
#pragma unroll
        for (int n = 0; n < MMA_COLUMNS; n++) {
            unsigned operand[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const unsigned a = value[r][0].pair[n / 2], b = value[r][1].pair[n / 2];
                operand[r] = n % 2 ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
            }
            multiply(sum[n], weights.low[step], operand);
            multiply(sum[n], weights.high[step], operand);
        }
    }
    float check = 0.f;
#pragma unroll
    for (int n = 0; n < MMA_COLUMNS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            check += 0.f * sum[n][i];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int y = 2 * (cell_y + r) + group % 4 / 2, x = 2 * (cell_x + group / 4) + group % 2;
        Pairs<4> eight;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int n = k % 2 * 2, i = 2 * r + k / 2;
            eight.pair[k] = narrow_pair(sum[n][i], sum[n + 1][i]);
        }
        if (y < 2 * h && x < 2 * w && stored < C)
            *reinterpret_cast<Pairs<4>*>(
                output + ((long long)y * 2 * w + x) * C + stored) = eight;
    }
    return check == 0.f;
}
