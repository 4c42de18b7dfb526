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

#endif
