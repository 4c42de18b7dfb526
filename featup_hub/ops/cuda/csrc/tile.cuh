// A block's tile of pixels whose kernels are predicted, and their logits.
#pragma once

#include "device.cuh"

#ifndef JBU_GUIDANCE
#define JBU_GUIDANCE 3
#endif

constexpr int GUIDANCE = JBU_GUIDANCE;
constexpr int KEYS = 32;
constexpr int INPUTS = TAPS + GUIDANCE;
constexpr float MIN_TEMPERATURE = 1e-4f, MAX_TEMPERATURE = 1e4f;
constexpr float MIN_SUM = 1e-7f;
constexpr float FIXUP_SCALE = 0.1f;

// Whether to correct kernels on tensor cores.
#ifndef JBU_TENSOR_CORES
#define JBU_TENSOR_CORES FAST_TF32
#endif

// A tile: 4 rows of 32 pixels. To find logits, a warp owns one row of taps and a lane four
// neighbouring pixels. Tensor cores take 16 pixels a warp; the eighth warp finds no logits.
constexpr int PX = 4, GROUPS = 32, WIDTH = 32, HEIGHT = GROUPS * PX / WIDTH, SIZE = GROUPS * PX;
constexpr int PITCH = SIZE + 4;
constexpr int THREADS = GROUPS * (JBU_TENSOR_CORES ? SIZE / 16 : DIAMETER);

constexpr int KEY_CHUNK = 8;    // channels of the projection in shared memory at a time
constexpr int KEY_ROWS = HEIGHT + 2 * RADIUS, KEY_PITCH = 40;

constexpr int SHARED_BYTES = 768 * INPUTS;    // the launcher's number
static_assert(KEY_CHUNK * KEY_ROWS * KEY_PITCH * sizeof(float) <= SHARED_BYTES, "keys fit");

struct Tile {
    const int group = threadIdx.x % GROUPS, slot = threadIdx.x / GROUPS;
    const int y = group * PX / WIDTH, x = group * PX % WIDTH;  // of the first pixel, in the tile
    const int top = blockIdx.y * HEIGHT, left = blockIdx.x * WIDTH;

    __device__ void read(float (&value)[PX], const float* channel) const
    {
        load4(value, channel + PX * group);
    }
    __device__ void write(float* channel, const float (&value)[PX]) const
    {
        store4(channel + PX * group, value);
    }
};

// The learned correction: two layers, weights (49, INPUTS) and (49, 49).
struct Fixup {
    const float *weight0, *bias0, *weight1, *bias1;
};

static __device__ __forceinline__ float temperature(const float* range_temp)
{
    return fminf(fmaxf(expf(*range_temp), MIN_TEMPERATURE), MAX_TEMPERATURE);
}

// s_t of the tap in this row and column.
static __device__ __forceinline__ float spatial_weight(int row, int column, float sigma)
{
    const float v = (row - RADIUS) / float(RADIUS), u = (column - RADIUS) / float(RADIUS);
    return expf(-(v * v + u * u) / (2.f * sigma * sigma));
}

// logit[a] = <p_0, p_t> for the thread's pixels and its row of taps, t = (slot, a).
static __device__ __forceinline__ void match(
    float (&logit)[DIAMETER][PX], const Tile& tile, const float* __restrict__ projection,
    float* keys, int H, int W)
{
    constexpr int COLUMNS = WIDTH + 2 * RADIUS;
    constexpr int SHARE = (KEY_ROWS * COLUMNS + THREADS - 1) / THREADS;
    int from[SHARE], to[SHARE];
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int row = (threadIdx.x + i * THREADS) / COLUMNS;
        const int column = (threadIdx.x + i * THREADS) % COLUMNS;
        from[i] = reflect(tile.top + row - RADIUS, H) * W + reflect(tile.left + column - RADIUS, W);
        to[i] = row < KEY_ROWS ? row * KEY_PITCH + column + 1 : -1;
    }
#pragma unroll
    for (int a = 0; a < DIAMETER; a++)
#pragma unroll
        for (int p = 0; p < PX; p++)
            logit[a][p] = 0.f;

    const long long plane = (long long)H * W;
    for (int c = 0; c < KEYS; c += KEY_CHUNK) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < KEY_CHUNK; k++)
#pragma unroll
            for (int i = 0; i < SHARE; i++)
                if (to[i] >= 0)
                    keys[k * KEY_ROWS * KEY_PITCH + to[i]] = projection[(c + k) * plane + from[i]];
        __syncthreads();
        if (tile.slot >= DIAMETER)
            continue;
#pragma unroll 2
        for (int k = 0; k < KEY_CHUNK; k++) {
            const float* line = keys + (k * KEY_ROWS + tile.y) * KEY_PITCH + tile.x;
            float centre[PX], near[PX + 8];  // near[1 + i] is i - RADIUS to the right of centre[0]
            load4(centre, line + RADIUS * KEY_PITCH + RADIUS + 1);
#pragma unroll
            for (int i = 0; i < PX + 8; i += 4)
                load4(near + i, line + tile.slot * KEY_PITCH + i);
#pragma unroll
            for (int a = 0; a < DIAMETER; a++)
#pragma unroll
                for (int p = 0; p < PX; p++)
                    logit[a][p] += centre[p] * near[1 + a + p];
        }
    }
    __syncthreads();
}
