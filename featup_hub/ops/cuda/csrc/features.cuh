// Feature maps in memory: their type (-DJBU_TYPE) and how four channels of them are moved.
#pragma once

#include "device.cuh"
#include "ptx.cuh"

#ifndef JBU_TYPE
#define JBU_TYPE 0
#endif

#if JBU_TYPE == 0
using Feature = float;
#else
using Feature = unsigned short;
#endif

static __device__ __forceinline__ float widen(Feature bits)
{
#if JBU_TYPE == 0
    return bits;
#elif JBU_TYPE == 1
    return half_to_float(bits);
#else
    return __uint_as_float((unsigned)bits << 16);
#endif
}

// Rounds to the nearest, ties to even, as torch does.
static __device__ __forceinline__ Feature narrow(float value)
{
#if JBU_TYPE == 0
    return value;
#elif JBU_TYPE == 1
    return float_to_half(value);
#elif __CUDA_ARCH__ >= 800
    return (Feature)floats_to_bfloats(value, 0.f);
#else
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return 0x7fc0;
    return (Feature)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// The maps of one image.
struct Maps {
    const Feature* source;
    const float* bias;
    Feature* output;
    int h, w, H, W, C;
};

struct __align__(4 * sizeof(Feature)) Features {
    Feature channel[4];
};

// Whether four channels of every pixel can be moved at once.
static __device__ __forceinline__ bool in_fours(const void* features, int channels)
{
    return channels % 4 == 0 && (unsigned long long)features % sizeof(Features) == 0;
}

// The next `count` channels; those beyond four wait, those beyond `count` are zero.
template <bool FOURS>
static __device__ __forceinline__ Features load_four(const Feature* from, int count)
{
    Features four;
    if constexpr (FOURS)
        four = *reinterpret_cast<const Features*>(from);
    else
#pragma unroll
        for (int k = 0; k < 4; k++)
            four.channel[k] = k < count ? from[k] : Feature(0);
    return four;
}

template <bool FOURS>
static __device__ __forceinline__ void load_features(float (&to)[4], const Feature* from, int count)
{
    const Features four = load_four<FOURS>(from, count);
#pragma unroll
    for (int k = 0; k < 4; k++)
        to[k] = widen(four.channel[k]);
}

template <bool FOURS>
static __device__ __forceinline__ void store_features(
    Feature* to, const float (&from)[4], int count)
{
    if (FOURS) {
        Features four;
#pragma unroll
        for (int k = 0; k < 4; k++)
            four.channel[k] = narrow(from[k]);
        *reinterpret_cast<Features*>(to) = four;
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count)
                to[k] = narrow(from[k]);
    }
}
