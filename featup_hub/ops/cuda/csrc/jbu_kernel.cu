// Guidance -> one 7x7 kernel per pixel. Matches reference.jbu_kernel; its adjoint is next door.
//
//   p(u)   = W1 gelu(W0 g(u) + b0) + b1                              range_forward
//   k_t(u) = e_t s_t / max(sum_t e_t s_t, 1e-7 sum_t e_t),  e_t = exp(T <p(u), p(u + t)>),
//            s_t = exp(-|t|^2 / 2 sigma^2), p mirrored at the border
//   out(u) = k + 0.1 (V1 gelu(V0 [k, g] + c0) + c1)                  kernel_forward
//
// Nothing of 49 x 32 or of C x H x W values is ever in memory: logits and hidden units live and die
// in registers and in one tile's shared memory.
//
// ABI
//
// Options: -DJBU_GUIDANCE=G (guidance channels, 1..14; default 3), --std=c++17, no fast math.
// Headers by name: device.cuh, tile.cuh. All tensors float32 and contiguous; aligned to 4 bytes is
// enough. Key channels 32, radius 3, 49 taps. B <= 65535, H*W < 2^31 - 512. Letters as in driver.Signature.
//
//   range_forward   PPPPP P i       guidance (B,G,H,W), range_w0 (32,G), range_b0 (32),
//                                   range_w1 (32,32), range_b1 (32), out projection (B,32,H,W),
//                                   pixels = H*W
//       grid (ceil(pixels/512), B, 1)    block 128    shared 0
//   kernel_forward  PPPP PPPP P ii  guidance, projection, range_temp (), sigma_spatial (),
//                                   fixup_w0 (49,49+G), fixup_b0 (49), fixup_w1 (49,49),
//                                   fixup_b1 (49), out kernel (B,H,W,49), H, W
//       grid (ceil(W/32), ceil(H/4), B)  block 112    shared 528*(49+G) bytes

#include "tile.cuh"

constexpr int RANGE_THREADS = 128, RANGE_PIXELS = 4;

// One thread: four pixels, a block's width apart, so that a weight read serves four.
extern "C" __global__ void __launch_bounds__(RANGE_THREADS) range_forward(
    const float* __restrict__ guidance, const float* __restrict__ range_w0,
    const float* __restrict__ range_b0, const float* __restrict__ range_w1,
    const float* __restrict__ range_b1, float* __restrict__ projection, int pixels)
{
    const int first = blockIdx.x * RANGE_THREADS * RANGE_PIXELS + threadIdx.x;
    guidance += (long long)blockIdx.y * GUIDANCE * pixels;
    projection += (long long)blockIdx.y * KEYS * pixels;

    float color[GUIDANCE][RANGE_PIXELS], hidden[KEYS][RANGE_PIXELS];
#pragma unroll
    for (int c = 0; c < GUIDANCE; c++)
#pragma unroll
        for (int p = 0; p < RANGE_PIXELS; p++)
            color[c][p] = guidance[(long long)c * pixels + clamp(first + p * RANGE_THREADS, pixels)];
#pragma unroll
    for (int k = 0; k < KEYS; k++)
#pragma unroll
        for (int p = 0; p < RANGE_PIXELS; p++) {
            float sum = range_b0[k];
#pragma unroll
            for (int c = 0; c < GUIDANCE; c++)
                sum += range_w0[k * GUIDANCE + c] * color[c][p];
            hidden[k][p] = gelu(sum);
        }
#pragma unroll 1
    for (int key = 0; key < KEYS; key++) {
        float sum[RANGE_PIXELS];
#pragma unroll
        for (int p = 0; p < RANGE_PIXELS; p++)
            sum[p] = range_b1[key];
#pragma unroll
        for (int k = 0; k < KEYS; k++)
#pragma unroll
            for (int p = 0; p < RANGE_PIXELS; p++)
                sum[p] += range_w1[key * KEYS + k] * hidden[k][p];
#pragma unroll
        for (int p = 0; p < RANGE_PIXELS; p++)
            if (first + p * RANGE_THREADS < pixels)
                projection[(long long)key * pixels + first + p * RANGE_THREADS] = sum[p];
    }
}

constexpr int PX = 8;
constexpr int PITCH = Tile<PX>::PITCH;
constexpr int THREADS = Tile<PX>::GROUPS * DIAMETER;

// Shared memory, reused in turn: keys; exchange of the softmax; [k, g]; hidden units; the result.
constexpr int SHARED_FLOATS = (TAPS + GUIDANCE) * PITCH;
static_assert(SHARED_FLOATS * sizeof(float) == 528 * (49 + GUIDANCE), "the launcher's number");
static_assert(KEY_CHUNK * KEY_ROWS<PX> * KEY_PITCH <= SHARED_FLOATS, "keys fit");
static_assert(3 * DIAMETER * PITCH <= SHARED_FLOATS, "the exchange fits");
static_assert(Tile<PX>::SIZE * TAPS <= SHARED_FLOATS, "the result fits");

// One thread: eight pixels in a row times seven taps, or seven hidden units.
extern "C" __global__ void __launch_bounds__(THREADS, 3) kernel_forward(
    const float* __restrict__ guidance, const float* __restrict__ projection,
    const float* __restrict__ range_temp, const float* __restrict__ sigma_spatial,
    const float* __restrict__ fixup_w0, const float* __restrict__ fixup_b0,
    const float* __restrict__ fixup_w1, const float* __restrict__ fixup_b1,
    float* __restrict__ kernel, int H, int W)
{
    extern __shared__ __align__(16) float shared[];
    const Tile<PX> tile(blockIdx.y * Tile<PX>::HEIGHT, blockIdx.x * Tile<PX>::WIDTH);
    const long long plane = (long long)H * W;
    guidance += blockIdx.z * GUIDANCE * plane;
    projection += blockIdx.z * KEYS * plane;
    kernel += blockIdx.z * plane * TAPS;

    Taps<PX> taps;
    match<PX, THREADS>(taps.e, tile, projection, shared, H, W);
    soften(taps, tile, range_temp, sigma_spatial, shared);

    const int first = DIAMETER * tile.slot;
    float k[DIAMETER][PX], sum[DIAMETER][PX], value[PX];
#pragma unroll
    for (int a = 0; a < DIAMETER; a++) {
#pragma unroll
        for (int p = 0; p < PX; p++) {
            k[a][p] = taps.k(a, p);
            sum[a][p] = fixup_b0[first + a];
        }
        tile.write(shared + (first + a) * PITCH, k[a]);
    }
    for (int i = threadIdx.x; i < GUIDANCE * Tile<PX>::SIZE; i += THREADS) {
        const int channel = i / Tile<PX>::SIZE, pixel = i % Tile<PX>::SIZE;
        const int y = clamp(tile.top + pixel / Tile<PX>::WIDTH, H);
        const int x = clamp(tile.left + pixel % Tile<PX>::WIDTH, W);
        shared[(TAPS + channel) * PITCH + Tile<PX>::column(pixel)] =
            guidance[channel * plane + (long long)y * W + x];
    }
    __syncthreads();

    constexpr int INPUTS = TAPS + GUIDANCE;
    multiply(sum, tile, fixup_w0 + first * INPUTS, INPUTS, 1, shared, INPUTS);
    __syncthreads();
#pragma unroll
    for (int a = 0; a < DIAMETER; a++) {
#pragma unroll
        for (int p = 0; p < PX; p++) {
            value[p] = gelu(sum[a][p]);
            sum[a][p] = fixup_b1[first + a];
        }
        tile.write(shared + (first + a) * PITCH, value);
    }
    __syncthreads();
    multiply(sum, tile, fixup_w1 + first * TAPS, TAPS, 1, shared, TAPS);
    __syncthreads();
#pragma unroll
    for (int a = 0; a < DIAMETER; a++)
#pragma unroll
        for (int p = 0; p < PX; p++)
            shared[(tile.group * PX + p) * TAPS + first + a] = k[a][p] + FIXUP_SCALE * sum[a][p];
    __syncthreads();

    // A row of the tile is contiguous in memory: pixels follow one another, taps within.
    const int width = min(Tile<PX>::WIDTH, W - tile.left) * TAPS;
    for (int y = 0; y < min(Tile<PX>::HEIGHT, H - tile.top); y++) {
        float* line = kernel + ((long long)(tile.top + y) * W + tile.left) * TAPS;
        for (int i = threadIdx.x; i < width; i += THREADS)
            line[i] = shared[y * Tile<PX>::WIDTH * TAPS + i];
    }
}
