// Guidance -> one 7x7 kernel per pixel. Matches reference.jbu_kernel.
//
//   p(u)   = W1 gelu(W0 g(u) + b0) + b1                              range_forward
//   k_t(u) = e_t s_t / max(sum_t e_t s_t, 1e-7 sum_t e_t),  e_t = exp(T <p(u), p(u + t)>),
//            s_t = exp(-|t|^2 / 2 sigma^2), p mirrored at the border
//   out(u) = k + 0.1 (V1 gelu(V0 [k, g] + c0) + c1)                  kernel_forward
//
// Logits and hidden units stay in registers and in one tile's shared memory. The correction, V, is
// computed on tensor cores where these are faster (predict_mma.cuh), else by predict.cuh.
//
// ABI
//
// Options: -DJBU_GUIDANCE=G (guidance channels, 1..14; default 3), --std=c++17, no fast math.
// -DJBU_TENSOR_CORES=0 or 1 decides where the correction is computed, for comparison.
// All tensors float32 and contiguous; aligned to 4 bytes is enough. Key channels 32, radius 3, 49
// taps. B <= 65535, H*W < 2^31 - 512. Letters as in driver.Signature.
//
//   range_forward   PPPPP P i       guidance (B,G,H,W), range_w0 (32,G), range_b0 (32),
//                                   range_w1 (32,32), range_b1 (32), out projection (B,32,H,W),
//                                   pixels = H*W
//       grid (ceil(pixels/128), B, 1)    block 128    shared 128*(32+G) bytes
//   kernel_forward  PPPP PPPP P ii  guidance, projection, range_temp (), sigma_spatial (),
//                                   fixup_w0 (49,49+G), fixup_b0 (49), fixup_w1 (49,49),
//                                   fixup_b1 (49), out kernel (B,H,W,49), H, W
//       grid (ceil(W/32), ceil(H/4), B)  block 256    shared 768*(49+G) bytes

#include "predict.cuh"
#include "predict_mma.cuh"

constexpr int RANGE_THREADS = 128;

// One thread: one pixel. Weights are in shared memory: a read of four serves a warp.
extern "C" __global__ void __launch_bounds__(RANGE_THREADS) range_forward(
    const float* __restrict__ guidance, const float* __restrict__ range_w0,
    const float* __restrict__ range_b0, const float* __restrict__ range_w1,
    const float* __restrict__ range_b1, float* __restrict__ projection, int pixels)
{
    extern __shared__ __align__(16) float shared[];
    float* second = shared + KEYS * GUIDANCE;
    for (int i = threadIdx.x; i < KEYS * GUIDANCE; i += RANGE_THREADS)
        shared[i] = range_w0[i];
#pragma unroll
    for (int i = threadIdx.x; i < KEYS * KEYS; i += RANGE_THREADS)
        second[i] = range_w1[i];
    __syncthreads();
    const int pixel = blockIdx.x * RANGE_THREADS + threadIdx.x;
    if (pixel >= pixels)
        return;
    guidance += (long long)blockIdx.y * GUIDANCE * pixels + pixel;
    projection += (long long)blockIdx.y * KEYS * pixels + pixel;

    float hidden[KEYS];
#pragma unroll
    for (int k = 0; k < KEYS; k++)
        hidden[k] = range_b0[k];
#pragma unroll
    for (int c = 0; c < GUIDANCE; c++)
#pragma unroll
        for (int k = 0; k < KEYS; k++)
            hidden[k] += shared[k * GUIDANCE + c] * guidance[(long long)c * pixels];
#pragma unroll
    for (int k = 0; k < KEYS; k++)
        hidden[k] = gelu(hidden[k]);
#pragma unroll 4
    for (int key = 0; key < KEYS; key++) {
        float sum = range_b1[key];
#pragma unroll
        for (int k = 0; k < KEYS; k++)
            sum += second[key * KEYS + k] * hidden[k];
        projection[(long long)key * pixels] = sum;
    }
}

constexpr int LAUNCHED = 256;    // threads

extern "C" __global__ void __launch_bounds__(LAUNCHED, 2) kernel_forward(
    const float* __restrict__ guidance, const float* __restrict__ projection,
    const float* __restrict__ range_temp, const float* __restrict__ sigma_spatial,
    const float* __restrict__ fixup_w0, const float* __restrict__ fixup_b0,
    const float* __restrict__ fixup_w1, const float* __restrict__ fixup_b1,
    float* __restrict__ kernel, int H, int W)
{
    extern __shared__ __align__(16) float shared[];
    // Barriers do not wait for threads that have ended.
    if (threadIdx.x >= THREADS)
        return;
    const long long plane = (long long)H * W;
    const Fixup fixup = {fixup_w0, fixup_b0, fixup_w1, fixup_b1};
    predict(shared, guidance + blockIdx.z * GUIDANCE * plane, projection + blockIdx.z * KEYS * plane,
            range_temp, sigma_spatial, fixup, kernel + blockIdx.z * plane * TAPS, H, W);
}
