// Kernels of a tile with the correction on tensor cores.
//
// A layer is a product of 16 pixels (M) a warp, eight inputs a step (K) and 56 units in seven
// products side by side (N); 49 units are useful, the others have weight zero. Operands are TF32
// numbers, which keep 11 bits: x = high + low, and high high + high low + low high keeps 21.
//
// A lane holds 2 pixels x 2 columns of every product: pixels g and g + 8 of the warp's 16, columns
// 2t and 2t + 1 of eight, g = lane / 4, t = lane % 4. The machine wants columns t and t + 4 of an
// operand, but inputs may be summed in any order. So taps are the first layer's operand, hidden
// units the second's, and what a layer computes stays in the registers where the next one needs it.
#pragma once

#include "ptx.cuh"
#include "tf32.cuh"
#include "tile.cuh"

#if JBU_TENSOR_CORES

constexpr int UNITS = 7, STEPS = (INPUTS + 7) / 8;    // in eights
static_assert(TAPS <= 8 * UNITS && UNITS <= STEPS, "hidden units need no more steps than inputs");

// Shared memory in turn: keys; logits and s_t; weights of a layer; the result.
constexpr int RESULT_PITCH = 8 * UNITS;    // a pixel's row
static_assert((TAPS * PITCH + TAPS) * sizeof(float) <= SHARED_BYTES, "logits fit");
static_assert(STEPS * UNITS * 32 * sizeof(Pair) <= SHARED_BYTES, "weights fit");
static_assert(SIZE * RESULT_PITCH * sizeof(float) <= SHARED_BYTES, "the result fits");

// Copies a layer's weights, (49, inputs) row-major, to [step][product][lane]; a warp those of its own
// eight units. What is beyond 49 units or the inputs is zero.
static __device__ __forceinline__ void load_layer(
    Pair* to, const float* __restrict__ weight, int inputs)
{
    const int unit = threadIdx.x / 4, first = threadIdx.x % 4 * 2;
    float value[STEPS][2] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (unit < TAPS && 8 * step + first + j < inputs)
                value[step][j] = weight[unit * inputs + 8 * step + first + j];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
        if (unit < 8 * UNITS)
            to[step * UNITS * 32 + threadIdx.x] = split(value[step][0], value[step][1]);
}

// sum = bias + weight x, of COUNT products from the first on.
template <int COUNT, int INPUT_STEPS>
static __device__ __forceinline__ void multiply(
    float (&sum)[COUNT][4], int first, const float* __restrict__ bias, const Pair* weight,
    const float (&x)[INPUT_STEPS][4])
{
    const int column = 8 * first + threadIdx.x % 4 * 2;
    weight += 32 * first + threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < COUNT; n++)
#pragma unroll
        for (int j = 0; j < 2; j++)
            sum[n][j] = sum[n][2 + j] = 8 * n + column + j < TAPS ? bias[8 * n + column + j] : 0.f;
#pragma unroll
    for (int step = 0; step < INPUT_STEPS; step++) {
        unsigned high[4], low[4];
        split(high, low, x[step]);
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            const Pair w = weight[(step * UNITS + n) * 32];
            multiply_tf32(sum[n], low, w.high);
            multiply_tf32(sum[n], high, w.low);
            multiply_tf32(sum[n], high, w.high);
        }
    }
    float check = 0.f;
#pragma unroll
    for (int n = 0; n < COUNT; n++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            check += 0.f * sum[n][r];
    if (__all_sync(0xffffffff, check == 0.f))
        return;
    // The low part of infinity is not a number. High parts alone give what is not finite.
#pragma unroll 1
    for (int n = 0; n < COUNT; n++) {
        float rough[4];
#pragma unroll
        for (int r = 0; r < 4; r++)
            rough[r] = 8 * n + column + r % 2 < TAPS ? bias[8 * n + column + r % 2] : 0.f;
#pragma unroll
        for (int step = 0; step < INPUT_STEPS; step++) {
            unsigned high[4], low[4];
            split(high, low, x[step]);
            multiply_tf32(rough, high, weight[(step * UNITS + n) * 32].high);
        }
#pragma unroll
        for (int m = 0; m < COUNT; m++)
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (m == n && 0.f * sum[m][r] != 0.f)
                    sum[m][r] = rough[r];
    }
}

// Combines what the four lanes of a pixel hold.
static __device__ __forceinline__ float quad_sum(float value)
{
    value += __shfl_xor_sync(0xffffffff, value, 1);
    return value + __shfl_xor_sync(0xffffffff, value, 2);
}

static __device__ __forceinline__ float quad_max(float value)
{
    value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xffffffff, value, 2));
}

// Turns logits into k_t; `spatial` holds s_t. Logits beyond the taps are minus infinity.
static __device__ __forceinline__ void soften(
    float (&taps)[STEPS][4], const float* spatial, float scale)
{
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // a pixel
        float top = taps[0][i], all = 0.f, kept = 0.f;
#pragma unroll
        for (int n = 0; n < UNITS; n++)
            top = fmaxf(top, fmaxf(taps[n][i], taps[n][i + 1]));
        top = quad_max(top);
#pragma unroll
        for (int n = 0; n < UNITS; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float& tap = taps[n][i + j];
                tap = expf(scale * (tap - top));
                all += tap;
                if (8 * n + column + j < TAPS)
                    tap *= spatial[8 * n + column + j];
                kept += tap;
            }
        const float share = 1.f / fmaxf(quad_sum(kept), MIN_SUM * quad_sum(all));
#pragma unroll
        for (int n = 0; n < UNITS; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                taps[n][i + j] *= share;
    }
}

// Adds the second layer's products FIRST, ... LAST - 1 to the taps.
template <int FIRST, int LAST>
static __device__ __forceinline__ void correct(
    float (&taps)[STEPS][4], const float* __restrict__ bias, const Pair* weight,
    const float (&hidden)[UNITS][4])
{
    float sum[LAST - FIRST][4];
    multiply(sum, FIRST, bias, weight, hidden);
#pragma unroll
    for (int n = FIRST; n < LAST; n++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            taps[n][r] += FIXUP_SCALE * sum[n - FIRST][r];
}

static __device__ __forceinline__ void predict(
    float* shared, const float* __restrict__ guidance, const float* __restrict__ projection,
    const float* range_temp, const float* sigma_spatial, const Fixup& fixup,
    float* __restrict__ kernel, int H, int W)
{
    const Tile tile;
    const long long plane = (long long)H * W;
    float logit[DIAMETER][PX];
    match(logit, tile, projection, shared, H, W);
    float* spatial = shared + TAPS * PITCH;
    if (threadIdx.x < TAPS)
        spatial[threadIdx.x] =
            spatial_weight(threadIdx.x / DIAMETER, threadIdx.x % DIAMETER, *sigma_spatial);
    if (tile.slot < DIAMETER)
#pragma unroll
        for (int a = 0; a < DIAMETER; a++)
            tile.write(shared + (DIAMETER * tile.slot + a) * PITCH, logit[a]);
    __syncthreads();

    // The lane's pixels (i) and columns (j) of product n: x[n][2 i + j], sum[n][2 i + j].
    const int lane = threadIdx.x % 32, column = lane % 4 * 2, pixel = 16 * tile.slot + lane / 4;
    float x[STEPS][4], sum[UNITS][4];
#pragma unroll
    for (int n = 0; n < UNITS; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int tap = 8 * n + column + r % 2;
            const float none = -__uint_as_float(0x7f800000u);
            x[n][r] = tap < TAPS ? shared[tap * PITCH + pixel + r / 2 * 8] : none;
        }
    soften(x, spatial, temperature(range_temp));
    // Guidance follows the taps.
    const int row = tile.top + tile.slot * 16 / WIDTH, left = tile.left + tile.slot * 16 % WIDTH;
#pragma unroll
    for (int n = TAPS / 8; n < STEPS; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int channel = 8 * n + column + r % 2 - TAPS;
            const int at = clamp(row, H) * W + clamp(left + lane / 4 + r / 2 * 8, W);
            if (channel >= 0)
                x[n][r] = channel < GUIDANCE ? guidance[channel * plane + at] : 0.f;
        }

    Pair* weight = reinterpret_cast<Pair*>(shared);
    __syncthreads();
    load_layer(weight, fixup.weight0, INPUTS);
    __syncthreads();
    multiply(sum, 0, fixup.bias0, weight, x);
    float hidden[UNITS][4];
#pragma unroll
    for (int n = 0; n < UNITS; n++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            hidden[n][r] = 8 * n + column + r % 2 < TAPS ? gelu(sum[n][r]) : 0.f;
    __syncthreads();
    load_layer(weight, fixup.weight1, TAPS);
    __syncthreads();
    // In two parts, so that registers suffice.
    correct<0, 4>(x, fixup.bias1, weight, hidden);
    correct<4, UNITS>(x, fixup.bias1, weight, hidden);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < UNITS; n++)
#pragma unroll
        for (int r = 0; r < 4; r++)
            shared[(pixel + r / 2 * 8) * RESULT_PITCH + 8 * n + column + r % 2] = x[n][r];
    __syncwarp();

    // A warp stores its own pixels, 49 taps one after another.
    float* to = kernel + ((long long)row * W + left) * TAPS + lane;
    const float* from = shared + 16 * tile.slot * RESULT_PITCH + lane;
#pragma unroll 4
    for (int i = 0; i < 16; i++)
        if (row < H && left + i < W) {
            to[i * TAPS] = from[i * RESULT_PITCH];
            if (lane + 32 < TAPS)
                to[i * TAPS + 32] = from[i * RESULT_PITCH + 32];
        }
}

#endif
