// Float32 numbers as two TF32 numbers: x = high + low. Both are cut, not rounded, so that no number
// becomes infinite; low keeps 11 of the 13 bits that high has left.
#pragma once

#include "ptx.cuh"

constexpr unsigned TF32 = 0xffffe000u;

static __device__ __forceinline__ unsigned cut(float x)
{
    return __float_as_uint(x) & TF32;
}

// Two rows of one column of a product's right operand, as a lane holds them.
struct __align__(16) Pair {
    unsigned high[2], low[2];
};

static __device__ __forceinline__ Pair split(float a, float b)
{
    Pair pair;
    pair.high[0] = cut(a);
    pair.high[1] = cut(b);
    pair.low[0] = cut(a - __uint_as_float(pair.high[0]));
    pair.low[1] = cut(b - __uint_as_float(pair.high[1]));
    return pair;
}

// A left operand, from [row][column] as a product's sums have it to [column][row].
static __device__ __forceinline__ void split(
    unsigned (&high)[4], unsigned (&low)[4], const float (&x)[4], unsigned mask = TF32)
{
#pragma unroll
    for (int r = 0; r < 4; r++) {
        unsigned value = __float_as_uint(x[r % 2 * 2 + r / 2]);
        opaque(value);
        high[r] = value & mask;
        low[r] = cut(__uint_as_float(value) - __uint_as_float(high[r]));
    }
}
