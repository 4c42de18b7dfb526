// What C++ cannot say: the machine's own instructions. Nothing else in this folder is assembly, so
// whoever runs the kernels elsewhere replaces this file alone. (No cuda_fp16.h: NVRTC comes
// without headers.)
#ifndef FEATUP_HUB_PTX_CUH
#define FEATUP_HUB_PTX_CUH

static __device__ __forceinline__ float half_to_float(unsigned short bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

static __device__ __forceinline__ unsigned short float_to_half(float value)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// From sm_80 on: two numbers in one word, the first in its lower half.
static __device__ __forceinline__ unsigned floats_to_halfs(float low, float high)
{
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ __forceinline__ unsigned floats_to_bfloats(float low, float high)
{
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// No instruction, but the compiler cannot know: what depends on the value is computed after this, and
// not kept in registers from earlier on.
static __device__ __forceinline__ void opaque(unsigned& value)
{
    asm volatile("" : "+r"(value));
}

// A warp's sum (16x8) += a * b, of 16x16 and 16x8 or of 16x8 and 8x8 numbers; which lane holds what:
// PTX ISA, "Matrix Fragments for mma.m16n8k16", "for mma.m16n8k8". Volatile, so that no product is
// moved into a branch that some lanes do not take.
#define MULTIPLY(shape, type)                                                                  \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 "               \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

static __device__ __forceinline__ void multiply_halfs(
    float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    MULTIPLY("m16n8k16", "f16");
}

static __device__ __forceinline__ void multiply_bfloats(
    float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    MULTIPLY("m16n8k16", "bf16");
}

// Operands are float32 numbers whose lower 13 bits are zero.
static __device__ __forceinline__ void multiply_tf32(
    float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    MULTIPLY("m16n8k8", "tf32");
}

#endif
