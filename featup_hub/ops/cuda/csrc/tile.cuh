// A tile of pixels and its small matrix products: what predicting kernels and its adjoint share.
//
// A block of 16 x SLOTS threads owns 16 groups of PX neighbouring pixels, 32 pixels to a row. A
// thread belongs to one group and one slot: one row of taps, or as many hidden units. Values that
// every slot needs lie in shared memory as operands, [channel][pixel]; values of one's own pixels
// and taps stay in registers. PX x 7 products per PX + 7 values read: arithmetic, not shared
// memory, is what such a loop waits for.
#pragma once

#include "device.cuh"

#ifndef JBU_GUIDANCE
#define JBU_GUIDANCE 3
#endif

constexpr int GUIDANCE = JBU_GUIDANCE;
constexpr int KEYS = 32;
constexpr float MIN_TEMPERATURE = 1e-4f, MAX_TEMPERATURE = 1e4f;
constexpr float MIN_SUM = 1e-7f;
constexpr float FIXUP_SCALE = 0.1f;

static_assert(1 <= GUIDANCE && GUIDANCE <= 14, "the adjoint holds guidance and bias in 15 columns");

template <int PX>
struct Tile {
    static constexpr int GROUPS = 16;
    static constexpr int WIDTH = 32;
    static constexpr int HEIGHT = GROUPS * PX / WIDTH;
    static constexpr int SIZE = GROUPS * PX;
    // Four words more than the pixels, so that the same pixel of 8 channels is in 8 banks.
    static constexpr int PITCH = SIZE + 4;

    const int group = threadIdx.x % GROUPS, slot = threadIdx.x / GROUPS;
    const int y = group * PX / WIDTH, x = group * PX % WIDTH;  // of the first pixel, in the tile
    const int top, left;                                       // of the tile, in the image

    __device__ Tile(int top, int left) : top(top), left(left) {}

    // Where an operand keeps a pixel: in fours, so that neighbouring threads read neighbours.
    static __device__ int column(int pixel)
    {
        return pixel % PX / 4 * (4 * GROUPS) + pixel / PX * 4 + pixel % 4;
    }

    __device__ void read(float (&value)[PX], const float* channel) const
    {
#pragma unroll
        for (int p = 0; p < PX; p += 4)
            load4(value + p, channel + p * GROUPS + 4 * group);
    }

    __device__ void write(float* channel, const float (&value)[PX]) const
    {
#pragma unroll
        for (int p = 0; p < PX; p += 4)
            store4(channel + p * GROUPS + 4 * group, value + p);
    }
};

// sum[a] += sum_i weight[a * row + i * step] * operand[i], for the thread's pixels.
template <int ROWS, int PX>
static __device__ __forceinline__ void multiply(
    float (&sum)[ROWS][PX], const Tile<PX>& tile, const float* __restrict__ weight, int row,
    int step, const float* operand, int count)
{
#pragma unroll 2
    for (int i = 0; i < count; i++) {
        float value[PX];
        tile.read(value, operand + i * Tile<PX>::PITCH);
#pragma unroll
        for (int a = 0; a < ROWS; a++) {
            const float w = weight[a * row + i * step];
#pragma unroll
            for (int p = 0; p < PX; p++)
                sum[a][p] += w * value[p];
        }
    }
}

// A pixel's taps before the correction, k_t = e_t s_t * scale, as a thread holds its row of them.
template <int PX>
struct Taps {
    float e[DIAMETER][PX];   // exp(T <p_0, p_t> - max)
    float s[DIAMETER];       // exp(-|t|^2 / 2 sigma^2), the kernel spanning [-1, 1]
    float scale[PX];         // 1 / max(sum e s, MIN_SUM * sum e)
    float floored[PX];       // 1 / sum e where that maximum was the second, else 0

    __device__ float k(int a, int p) const { return e[a][p] * s[a] * scale[p]; }
};

constexpr int KEY_CHUNK = 8;    // channels of the projection in shared memory at a time
constexpr int KEY_PITCH = 44;   // 1 + 38 + 5: four groups of 8 times two rows meet no bank twice

template <int PX>
constexpr int KEY_ROWS = Tile<PX>::HEIGHT + 2 * RADIUS;

// logit[a] = <p_0, p_t> for the thread's pixels and its row of taps, t = (slot, a).
template <int PX, int THREADS>
static __device__ __forceinline__ void match(
    float (&logit)[DIAMETER][PX], const Tile<PX>& tile, const float* __restrict__ projection,
    float* keys, int H, int W)
{
    constexpr int ROWS = KEY_ROWS<PX>, COLUMNS = Tile<PX>::WIDTH + 2 * RADIUS;
    constexpr int SHARE = (ROWS * COLUMNS + THREADS - 1) / THREADS;
    int from[SHARE], to[SHARE];
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int row = (threadIdx.x + i * THREADS) / COLUMNS;
        const int column = (threadIdx.x + i * THREADS) % COLUMNS;
        from[i] = reflect(tile.top + row - RADIUS, H) * W + reflect(tile.left + column - RADIUS, W);
        to[i] = row < ROWS ? row * KEY_PITCH + column + 1 : -1;
    }
#pragma unroll
    for (int a = 0; a < DIAMETER; a++)
#pragma unroll
        for (int p = 0; p < PX; p++)
            logit[a][p] = 0.f;

    const long long plane = (long long)H * W;
    for (int c = 0; c < KEYS; c += KEY_CHUNK) {
        __syncthreads();
#pragma unroll PX == 8 ? 4 : 2  // as many loads in flight as there are registers
        for (int k = 0; k < KEY_CHUNK; k++)
#pragma unroll
            for (int i = 0; i < SHARE; i++)
                if (to[i] >= 0)
                    keys[k * ROWS * KEY_PITCH + to[i]] = projection[(c + k) * plane + from[i]];
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < KEY_CHUNK; k++) {
            const float* line = keys + (k * ROWS + tile.y) * KEY_PITCH + tile.x;
            float centre[PX], near[PX + 8];  // near[1 + i] is i - RADIUS to the right of centre[0]
#pragma unroll
            for (int i = 0; i < PX; i += 4)
                load4(centre + i, line + RADIUS * KEY_PITCH + RADIUS + 1 + i);
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

static __device__ __forceinline__ float temperature_of(const float* range_temp)
{
    return fminf(fmaxf(expf(*range_temp), MIN_TEMPERATURE), MAX_TEMPERATURE);
}

// Turns taps.e from logits into the softmax's terms; `exchange` holds 3 x 7 channels.
template <int PX>
static __device__ __forceinline__ void soften(
    Taps<PX>& taps, const Tile<PX>& tile, const float* range_temp, const float* sigma_spatial,
    float* exchange)
{
    constexpr int PITCH = Tile<PX>::PITCH;
    const float temperature = temperature_of(range_temp), sigma = *sigma_spatial;
    float top[PX], all[PX], kept[PX], other[PX];
#pragma unroll
    for (int p = 0; p < PX; p++) {
        top[p] = taps.e[0][p];
#pragma unroll
        for (int a = 1; a < DIAMETER; a++)
            top[p] = fmaxf(top[p], taps.e[a][p]);
        all[p] = kept[p] = 0.f;
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
        const float v = (tile.slot - RADIUS) / float(RADIUS), u = (a - RADIUS) / float(RADIUS);
        taps.s[a] = expf(-(v * v + u * u) / (2.f * sigma * sigma));
#pragma unroll
        for (int p = 0; p < PX; p++) {
            taps.e[a][p] = expf(temperature * (taps.e[a][p] - top[p]));
            all[p] += taps.e[a][p];
            kept[p] += taps.e[a][p] * taps.s[a];
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
        taps.scale[p] = 1.f / fmaxf(kept[p], MIN_SUM * all[p]);
        taps.floored[p] = kept[p] < MIN_SUM * all[p] ? 1.f / all[p] : 0.f;
    }
    __syncthreads();
}
