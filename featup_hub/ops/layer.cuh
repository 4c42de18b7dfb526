// Gradients of a layer, summed over the pixels of a tile: what both adjoints of jbu_kernel.cu share.
#pragma once

#include "tile.cuh"

constexpr int PX = 4;
constexpr int PITCH = Tile<PX>::PITCH, SIZE = Tile<PX>::SIZE, GROUPS = Tile<PX>::GROUPS;

// sum[i][m] += sum over the tile's pixels of left[i] * right[group + 16 m]: the gradient of a layer
// of `count` inputs, its bias' being the one of an input that is always 1.
template <int ROWS, int COLUMNS>
static __device__ __forceinline__ void outer(
    float (&sum)[ROWS][COLUMNS], int group, const float* left, const float* right, int count)
{
#pragma unroll 1
    for (int p = 0; p < SIZE; p += 4) {
        float a[ROWS][4], b[COLUMNS][4];
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            load4(a[i], left + i * PITCH + p);
#pragma unroll
        for (int m = 0; m < COLUMNS; m++)
            load4(b[m], right + min(group + GROUPS * m, count - 1) * PITCH + p);
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int m = 0; m < COLUMNS; m++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    sum[i][m] += a[i][q] * b[m][q];
    }
}

// Writes such a gradient's rows, `first` being the thread's first.
template <int ROWS, int COLUMNS>
static __device__ __forceinline__ void write_layer(
    float* to, const float (&sum)[ROWS][COLUMNS], int first, int group, int count)
{
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int m = 0; m < COLUMNS; m++)
            if (group + GROUPS * m < count)
                to[(first + i) * count + group + GROUPS * m] = sum[i][m];
}
