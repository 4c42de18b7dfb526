// What all kernels use: the taps, the mirror, the activation, vectors of four.
#pragma once

// Whether three products of TF32 numbers on tensor cores are faster than one of float32 numbers:
// not on GeForce cards (8.6, 8.9, 12.0), where TF32 has the peak of float32.
#define FAST_TF32                                                                              \
    (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000 ||                  \
     __CUDA_ARCH__ == 1030)

constexpr int RADIUS = 3;
constexpr int DIAMETER = 2 * RADIUS + 1;
constexpr int TAPS = DIAMETER * DIAMETER;

// Mirrors a position into [0, size), as often as it takes; a single pixel repeats itself.
static __device__ __forceinline__ int reflect(int at, int size)
{
    while (at < 0 || at >= size)
        at = size == 1 ? 0 : at < 0 ? -at : 2 * (size - 1) - at;
    return at;
}

static __device__ __forceinline__ int clamp(int at, int size)
{
    return min(max(at, 0), size - 1);
}

// x * cdf(x) of the normal distribution.
static __device__ __forceinline__ float gelu(float x)
{
    return 0.5f * x * (1.f + erff(x * 0.70710678f));
}

static __device__ __forceinline__ void load4(float* to, const float* from)
{
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
}

static __device__ __forceinline__ void store4(float* to, const float* from)
{
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
