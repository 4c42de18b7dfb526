// The adjoint of jbu_kernel.cu from the logits on: gradients of the projection and the guidance.
//
// The logits' gradient dl comes from jbu_kernel_backward.cu, folded at the border, so that pixel v
// sees the pairs it is part of at offset d = -3..3 alone:
//
//   dL/dp(v) = T sum_d [ dl_d(v) + dl_{-d}(v + d) ] p(v + d)
//
// ABI: options, words and P as in jbu_kernel_backward.cu; in this order, after kernel_backward.
//
//   projection_backward  PPPP ii         projection, range_temp, grad_logits,
//                                        out grad_projection (B,32,H,W), H, W
//       grid (ceil(W/32), ceil(H/4), B)  block 128    shared 0
//   range_backward       PPPP PPP ii     guidance, range_w0, range_b0, range_w1, grad_projection,
//                                        io grad_guidance, out partial (P, M), pixels = H*W, B
//       grid (P, 1, 1)                   block 128    shared 272*(98+G) bytes
//       M = 32*(G+1) + 32*33: [range_w0 | range_b0] as (32, G+1) rows, bias last;
//       [range_w1 | range_b1] as (32, 33) rows, bias last. To be added up by sum_partials.

#include "layer.cuh"

// One thread: one pixel, its 49 pairs in registers, all channels of the projection.
extern "C" __global__ void __launch_bounds__(128, 3) projection_backward(
    const float* __restrict__ projection, const float* __restrict__ range_temp,
    const float* __restrict__ grad_logits, float* __restrict__ grad_projection, int H, int W)
{
    const int x = blockIdx.x * 32 + threadIdx.x % 32, y = blockIdx.y * 4 + threadIdx.x / 32;
    if (x >= W || y >= H)
        return;
    const long long plane = (long long)H * W, at = (long long)y * W + x;
    projection += blockIdx.z * KEYS * plane;
    grad_logits += blockIdx.z * TAPS * plane;
    grad_projection += blockIdx.z * KEYS * plane;

    const float temperature = temperature_of(range_temp);
    float pair[TAPS];
#pragma unroll
    for (int t = 0; t < TAPS; t++) {
        const int dy = t / DIAMETER - RADIUS, dx = t % DIAMETER - RADIUS;
        const bool inside = 0 <= y + dy && y + dy < H && 0 <= x + dx && x + dx < W;
        pair[t] = 0.f;
        if (inside)
            pair[t] = temperature * (grad_logits[t * plane + at] +
                                     grad_logits[(TAPS - 1 - t) * plane + at + dy * W + dx]);
    }
#pragma unroll 1
    for (int key = 0; key < KEYS; key++) {
        const float* keys = projection + key * plane;
        float sum = 0.f;
#pragma unroll
        for (int t = 0; t < TAPS; t++) {
            const int row = clamp(y + t / DIAMETER - RADIUS, H);
            const int column = clamp(x + t % DIAMETER - RADIUS, W);
            sum += pair[t] * keys[row * W + column];
        }
        grad_projection[key * plane + at] = sum;
    }
}

constexpr int UNITS = 4;  // of a thread
constexpr int RANGE_THREADS = GROUPS * KEYS / UNITS;
static_assert((2 * KEYS + KEYS + 1 + GUIDANCE + 1) * PITCH * sizeof(float) == 272 * (98 + GUIDANCE),
              "the launcher's number");

// One thread: four pixels times four hidden units, and its share of each layer's gradient.
extern "C" __global__ void __launch_bounds__(RANGE_THREADS) range_backward(
    const float* __restrict__ guidance, const float* __restrict__ range_w0,
    const float* __restrict__ range_b0, const float* __restrict__ range_w1,
    const float* __restrict__ grad_projection, float* __restrict__ grad_guidance,
    float* __restrict__ partial, int pixels, int B)
{
    extern __shared__ __align__(16) float shared[];
    float* color = shared;                           // [g, 1]
    float* hidden = color + (GUIDANCE + 1) * PITCH;  // [units, 1]
    float* units = hidden + (KEYS + 1) * PITCH;      // the units' gradient
    float* upper = units + KEYS * PITCH;             // the projection's gradient
    const int tiles = (pixels + SIZE - 1) / SIZE;
    const Tile<PX> tile(0, 0);
    const int first = UNITS * tile.slot;

    float first_layer[UNITS][1] = {}, second_layer[UNITS][3] = {};
    for (int i = threadIdx.x; i < SIZE; i += RANGE_THREADS)
        color[GUIDANCE * PITCH + i] = hidden[KEYS * PITCH + i] = 1.f;

    for (long long n = blockIdx.x; n < (long long)B * tiles; n += gridDim.x) {
        const long long b = n / tiles;
        const int start = n % tiles * SIZE;
        __syncthreads();
#pragma unroll 2
        for (int i = threadIdx.x; i < KEYS * SIZE; i += RANGE_THREADS) {
            const int key = i / SIZE, pixel = i % SIZE;
            const long long at = (b * KEYS + key) * pixels + start + pixel;
            upper[key * PITCH + pixel] = start + pixel < pixels ? grad_projection[at] : 0.f;
        }
#pragma unroll 2
        for (int i = threadIdx.x; i < GUIDANCE * SIZE; i += RANGE_THREADS)
            color[i / SIZE * PITCH + i % SIZE] =
                guidance[(b * GUIDANCE + i / SIZE) * pixels + clamp(start + i % SIZE, pixels)];
        __syncthreads();

        float unit[UNITS][PX], grad[UNITS][PX] = {}, value[PX];
#pragma unroll
        for (int a = 0; a < UNITS; a++)
#pragma unroll
            for (int p = 0; p < PX; p++)
                unit[a][p] = range_b0[first + a];
        multiply(unit, tile, range_w0 + first * GUIDANCE, GUIDANCE, 1, color, GUIDANCE);
        multiply(grad, tile, range_w1 + first, 1, KEYS, upper, KEYS);
#pragma unroll
        for (int a = 0; a < UNITS; a++) {
#pragma unroll
            for (int p = 0; p < PX; p++) {
                value[p] = gelu_and_slope(unit[a][p]);
                grad[a][p] *= unit[a][p];
            }
            tile.write(hidden + (first + a) * PITCH, value);
            tile.write(units + (first + a) * PITCH, grad[a]);
        }
        __syncthreads();
        outer(second_layer, tile.group, upper + first * PITCH, hidden, KEYS + 1);
        outer(first_layer, tile.group, units + first * PITCH, color, GUIDANCE + 1);
#pragma unroll 2
        for (int i = threadIdx.x; i < GUIDANCE * SIZE; i += RANGE_THREADS) {
            const int channel = i / SIZE, pixel = i % SIZE;
            float sum = 0.f;
            for (int j = 0; j < KEYS; j++)
                sum += range_w0[j * GUIDANCE + channel] * units[j * PITCH + pixel];
            if (start + pixel < pixels)
                grad_guidance[(b * GUIDANCE + channel) * pixels + start + pixel] += sum;
        }
    }
    partial += (long long)blockIdx.x * (KEYS * (GUIDANCE + 1) + KEYS * (KEYS + 1));
    write_layer(partial, first_layer, first, tile.group, GUIDANCE + 1);
    write_layer(partial + KEYS * (GUIDANCE + 1), second_layer, first, tile.group, KEYS + 1);
}
