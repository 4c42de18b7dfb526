// Kernels of a tile on architectures without fast tensor cores. A warp owns one row of taps, or as
// many hidden units, so that all of its lanes need the same weights; a lane owns four neighbouring
// pixels. Operands of all warps are in shared memory, [channel][pixel].
#pragma once

#include "tile.cuh"

#if !JBU_TENSOR_CORES

// A layer's weights in shared memory, [input][row of seven, padded to eight], plus four floats
// against bank conflicts.
constexpr int WEIGHT_PITCH = 8 * DIAMETER + 4;

// Shared memory: weights; and, in turn, keys, exchange of the softmax, [k, g], hidden units, result.
constexpr int OPERAND_FLOATS = INPUTS * PITCH;
static_assert((OPERAND_FLOATS + INPUTS * WEIGHT_PITCH) * sizeof(float) == SHARED_BYTES, "all fits");
static_assert(KEY_CHUNK * KEY_ROWS * KEY_PITCH <= OPERAND_FLOATS, "keys fit");
static_assert(3 * DIAMETER * PITCH <= OPERAND_FLOATS, "the exchange fits");
static_assert(SIZE * TAPS <= OPERAND_FLOATS, "the result fits");

// Copies a layer's weights, (49, count) row-major; a warp those of its own seven units.
static __device__ __forceinline__ void load_layer(
    float* to, const Tile& tile, const float* __restrict__ weight, int count)
{
    static_assert(INPUTS <= 64, "two inputs a lane");
    float value[DIAMETER][2] = {};
#pragma unroll
    for (int a = 0; a < DIAMETER; a++)
#pragma unroll
        for (int k = 0; k < 2; k++)
            if (tile.group + 32 * k < count)
                value[a][k] = weight[(DIAMETER * tile.slot + a) * count + tile.group + 32 * k];
#pragma unroll
    for (int a = 0; a < DIAMETER; a++)
#pragma unroll
        for (int k = 0; k < 2; k++)
            if (tile.group + 32 * k < count)
                to[(tile.group + 32 * k) * WEIGHT_PITCH + 8 * tile.slot + a] = value[a][k];
}

// sum[a] += sum_i weight[i][a] * operand[i], for the thread's pixels and its seven units.
static __device__ __forceinline__ void multiply(
    float (&sum)[DIAMETER][PX], const Tile& tile, const float* weight, const float* operand,
    int count)
{
#pragma unroll 4
    for (int i = 0; i < count; i++) {
        float value[PX], w[8];
        tile.read(value, operand + i * PITCH);
        load4(w, weight + i * WEIGHT_PITCH + 8 * tile.slot);
        load4(w + 4, weight + i * WEIGHT_PITCH + 8 * tile.slot + 4);
#pragma unroll
        for (int a = 0; a < DIAMETER; a++)
#pragma unroll
            for (int p = 0; p < PX; p++)
                sum[a][p] += w[a] * value[p];
    }
}

// Turns logits into k_t; `exchange` holds 3 x 7 channels.
static __device__ __forceinline__ void soften(
    float (&taps)[DIAMETER][PX], const Tile& tile, const float* range_temp,
    const float* sigma_spatial, float* exchange)
{
    const float scale = temperature(range_temp), sigma = *sigma_spatial;
    float top[PX], all[PX] = {}, kept[PX] = {}, other[PX], spatial[DIAMETER];
#pragma unroll
    for (int p = 0; p < PX; p++) {
        top[p] = taps[0][p];
#pragma unroll
        for (int a = 1; a < DIAMETER; a++)
            top[p] = fmaxf(top[p], taps[a][p]);
    }
    tile.write(exchange + tile.slot * PITCH, top);
    __syncthreads();
    for (int i = 0; i < DIAMETER; i++) {
        tile.read(other, exchange + i * PITCH);
#pragma unroll
        for (int p = 0; p < PX; p++)
            top[p] = fmaxf(top[p], other[p]);
    }
#pragma unroll
    for (int a = 0; a < DIAMETER; a++) {
        spatial[a] = spatial_weight(tile.slot, a, sigma);
#pragma unroll
        for (int p = 0; p < PX; p++) {
            taps[a][p] = expf(scale * (taps[a][p] - top[p]));
            all[p] += taps[a][p];
            kept[p] += taps[a][p] * spatial[a];
        }
    }
    tile.write(exchange + (DIAMETER + tile.slot) * PITCH, all);
    tile.write(exchange + (2 * DIAMETER + tile.slot) * PITCH, kept);
    __syncthreads();
#pragma unroll
    for (int p = 0; p < PX; p++)
        all[p] = kept[p] = 0.f;
    for (int i = 0; i < DIAMETER; i++) {
        tile.read(other, exchange + (DIAMETER + i) * PITCH);
#pragma unroll
        for (int p = 0; p < PX; p++)
            all[p] += other[p];
        tile.read(other, exchange + (2 * DIAMETER + i) * PITCH);
#pragma unroll
        for (int p = 0; p < PX; p++)
            kept[p] += other[p];
    }
#pragma unroll
    for (int p = 0; p < PX; p++) {
        const float share = 1.f / fmaxf(kept[p], MIN_SUM * all[p]);
#pragma unroll
        for (int a = 0; a < DIAMETER; a++)
            taps[a][p] *= spatial[a] * share;
    }
    __syncthreads();
}

// One thread: four pixels in a row times seven taps, or seven hidden units.
static __device__ __forceinline__ void predict(
    float* shared, const float* __restrict__ guidance, const float* __restrict__ projection,
    const float* range_temp, const float* sigma_spatial, const Fixup& fixup,
    float* __restrict__ kernel, int H, int W)
{
    float* layer = shared + OPERAND_FLOATS;
    const Tile tile;
    const long long plane = (long long)H * W;
    load_layer(layer, tile, fixup.weight0, INPUTS);
    float k[DIAMETER][PX], sum[DIAMETER][PX], value[PX];
    match(k, tile, projection, shared, H, W);
    soften(k, tile, range_temp, sigma_spatial, shared);

    const int first = DIAMETER * tile.slot;
#pragma unroll
    for (int a = 0; a < DIAMETER; a++) {
#pragma unroll
        for (int p = 0; p < PX; p++)
            sum[a][p] = fixup.bias0[first + a];
        tile.write(shared + (first + a) * PITCH, k[a]);
    }
    for (int i = threadIdx.x; i < GUIDANCE * SIZE; i += THREADS) {
        const int channel = i / SIZE, pixel = i % SIZE;
        const int y = clamp(tile.top + pixel / WIDTH, H), x = clamp(tile.left + pixel % WIDTH, W);
        shared[(TAPS + channel) * PITCH + pixel] = guidance[channel * plane + (long long)y * W + x];
    }
    __syncthreads();
    multiply(sum, tile, layer, shared, INPUTS);
    __syncthreads();
    load_layer(layer, tile, fixup.weight1, TAPS);
#pragma unroll
    for (int a = 0; a < DIAMETER; a++) {
#pragma unroll
        for (int p = 0; p < PX; p++) {
            value[p] = gelu(sum[a][p]);
            sum[a][p] = fixup.bias1[first + a];
        }
        tile.write(shared + (first + a) * PITCH, value);
    }
    __syncthreads();
    multiply(sum, tile, layer, shared, TAPS);
    __syncthreads();
    // Every fourth pixel is in a separate row, so that a warp's lanes write to different banks.
#pragma unroll
    for (int a = 0; a < DIAMETER; a++)
#pragma unroll
        for (int p = 0; p < PX; p++)
            shared[(p * GROUPS + tile.group) * TAPS + first + a] = k[a][p] + FIXUP_SCALE * sum[a][p];
    __syncthreads();

    // A row of the tile is contiguous in memory: pixels follow one another, taps within.
    const int width = min(WIDTH, W - tile.left) * TAPS;
    for (int y = 0; y < min(HEIGHT, H - tile.top); y++) {
        float* line = kernel + ((long long)(tile.top + y) * W + tile.left) * TAPS;
        for (int i = threadIdx.x; i < width; i += THREADS) {
            const int x = i / TAPS;
            line[i] = shared[(x % PX * GROUPS + (y * WIDTH + x) / PX) * TAPS + i % TAPS];
        }
    }
}

#endif
