// The adjoint of jbu_kernel.cu up to the logits: gradients of the correction, the softmax and sigma.
// From there jbu_range_backward.cu goes on to the projection and the guidance.
//
// Everything is computed anew from guidance and projection, tile by tile; only the gradient of the
// 49 logits is stored. It is folded at the border (a tap that was mirrored counts for the pixel it
// read), so that the next program finds the pairs of a pixel at offsets d = -3..3 alone.
//
// Sums over pixels are deterministic: block i of P adds up its tiles in order, in registers, and
// writes one row; sum_partials adds the rows in order. No atomics.
//
// ABI
//
// Options and words as in jbu_kernel.cu; headers device.cuh, tile.cuh, layer.cuh. On one stream, in
// this order, after range_forward has computed the projection again: kernel_backward, then
// jbu_range_backward.cu; sum_partials after either.
// P = min(256, B*ceil(H/2)*ceil(W/32)): sums do not depend on the device.
//
//   kernel_backward      PPPP PPP PPPP iii  guidance, projection, range_temp, sigma_spatial,
//                                        fixup_w0, fixup_b0, fixup_w1, grad_kernel (B,H,W,49),
//                                        out grad_logits (B,49,H,W), out grad_guidance (B,G,H,W),
//                                        out partial (P, N), B, H, W
//       grid (P, 1, 1)                   block 112    shared 272*(149+G) bytes
//       N = 49*(50+G) + 49*50 + 2: [fixup_w0 | fixup_b0] as (49, 50+G) rows, bias last;
//       [fixup_w1 | fixup_b1] as (49, 50) rows, bias last; sigma_spatial; range_temp.
//   sum_partials         PP ii           partial (P, N), out total (N), P, N
//       grid (ceil(N/32), 1, 1)          block 256    shared 1024

#include "layer.cuh"

constexpr int INPUTS = TAPS + GUIDANCE;

// Adds up one number per thread, in order; thread 0 has the sum.
template <int THREADS>
static __device__ __forceinline__ float sum_block(float value, float* exchange)
{
    __syncthreads();
    exchange[threadIdx.x] = value;
    __syncthreads();
    float sum = 0.f;
    if (threadIdx.x == 0)
        for (int i = 0; i < THREADS; i++)
            sum += exchange[i];
    return sum;
}

// A pixel's gradient by where it was read: the taps that the mirror turned to offset (dy, dx).
static __device__ __forceinline__ float folded_tap(
    const float* gradient, int y, int x, int dy, int dx, int H, int W)
{
    if (y >= RADIUS && y < H - RADIUS && x >= RADIUS && x < W - RADIUS)
        return gradient[((dy + RADIUS) * DIAMETER + dx + RADIUS) * PITCH];
    float sum = 0.f;
#pragma unroll 1
    for (int i = 0; i < DIAMETER; i++)
#pragma unroll 1
        for (int j = 0; j < DIAMETER; j++)
            if (reflect(y + i - RADIUS, H) == y + dy && reflect(x + j - RADIUS, W) == x + dx)
                sum += gradient[(i * DIAMETER + j) * PITCH];
    return sum;
}

constexpr int KERNEL_THREADS = GROUPS * DIAMETER;
constexpr int KERNEL_FLOATS = (INPUTS + 1 + TAPS + 1 + TAPS) * PITCH;
static_assert(KERNEL_FLOATS * sizeof(float) == 272 * (149 + GUIDANCE), "the launcher's number");
static_assert(KEY_CHUNK * KEY_ROWS<PX> * KEY_PITCH <= TAPS * PITCH, "keys fit");
static_assert(3 * DIAMETER * PITCH <= TAPS * PITCH, "the exchange fits");

// One thread: four pixels times seven taps or hidden units; and, of each layer's gradient, seven
// rows times every sixteenth column, through all tiles of its block.
extern "C" __global__ void __launch_bounds__(KERNEL_THREADS) kernel_backward(
    const float* __restrict__ guidance, const float* __restrict__ projection,
    const float* __restrict__ range_temp, const float* __restrict__ sigma_spatial,
    const float* __restrict__ fixup_w0, const float* __restrict__ fixup_b0,
    const float* __restrict__ fixup_w1, const float* __restrict__ grad_kernel,
    float* __restrict__ grad_logits, float* __restrict__ grad_guidance,
    float* __restrict__ partial, int B, int H, int W)
{
    extern __shared__ __align__(16) float shared[];
    float* inputs = shared;                          // [k, g, 1]
    float* hidden = inputs + (INPUTS + 1) * PITCH;   // [units, 1]; then the units' gradient
    float* upper = hidden + (TAPS + 1) * PITCH;      // keys; exchange; k's gradient; the logits'
    const long long plane = (long long)H * W;
    const int tiles_x = (W + Tile<PX>::WIDTH - 1) / Tile<PX>::WIDTH;
    const int tiles_y = (H + Tile<PX>::HEIGHT - 1) / Tile<PX>::HEIGHT;

    float first_layer[DIAMETER][4] = {}, second_layer[DIAMETER][4] = {};
    float grad_sigma = 0.f, grad_temperature = 0.f;
    const float falloff = 0.5f / (RADIUS * RADIUS * *sigma_spatial * *sigma_spatial);
    for (int i = threadIdx.x; i < SIZE; i += KERNEL_THREADS)
        inputs[INPUTS * PITCH + i] = hidden[TAPS * PITCH + i] = 1.f;

    for (long long n = blockIdx.x; n < (long long)B * tiles_y * tiles_x; n += gridDim.x) {
        const int b = n / ((long long)tiles_y * tiles_x);
        const int top = n / tiles_x % tiles_y * Tile<PX>::HEIGHT;
        const Tile<PX> tile(top, n % tiles_x * Tile<PX>::WIDTH);
        const int first = DIAMETER * tile.slot;
        const int row_square = (tile.slot - RADIUS) * (tile.slot - RADIUS);

        const int y = tile.top + tile.y, x = tile.left + tile.x;
        float* own_logits = grad_logits + (b * TAPS + first) * plane + (long long)y * W + x;
        float value[PX], unit[DIAMETER][PX], grad[DIAMETER][PX] = {};
        bool floored[PX];
        {
            Taps<PX> taps;
            match<PX, KERNEL_THREADS>(taps.e, tile, projection + b * KEYS * plane, upper, H, W);
            soften(taps, tile, range_temp, sigma_spatial, upper);
#pragma unroll
            for (int a = 0; a < DIAMETER; a++) {
#pragma unroll
                for (int p = 0; p < PX; p++) {
                    value[p] = taps.k(a, p);
                    unit[a][p] = fixup_b0[first + a];
                    // Rare, and needed far below: kept where the result will be.
                    floored[p] = taps.floored[p] > 0.f && y < H && x + p < W;
                    if (floored[p])
                        own_logits[a * plane + p] = taps.e[a][p] * taps.floored[p];
                }
                tile.write(inputs + (first + a) * PITCH, value);
            }
        }
#pragma unroll 2
        for (int i = threadIdx.x; i < GUIDANCE * SIZE; i += KERNEL_THREADS) {
            const int channel = i / SIZE, pixel = i % SIZE;
            const int y = clamp(tile.top + pixel / Tile<PX>::WIDTH, H);
            const int x = clamp(tile.left + pixel % Tile<PX>::WIDTH, W);
            inputs[(TAPS + channel) * PITCH + pixel] =
                guidance[(b * GUIDANCE + channel) * plane + (long long)y * W + x];
        }
#pragma unroll 2
        for (int i = threadIdx.x; i < SIZE * TAPS; i += KERNEL_THREADS) {
            const int pixel = i / TAPS, tap = i % TAPS;
            const int y = tile.top + pixel / Tile<PX>::WIDTH;
            const int x = tile.left + pixel % Tile<PX>::WIDTH;
            upper[tap * PITCH + pixel] =
                y < H && x < W ? grad_kernel[(b * plane + (long long)y * W + x) * TAPS + tap] : 0.f;
        }
        __syncthreads();

        multiply(unit, tile, fixup_w0 + first * INPUTS, INPUTS, 1, inputs, INPUTS);
#pragma unroll
        for (int a = 0; a < DIAMETER; a++) {
#pragma unroll
            for (int p = 0; p < PX; p++)
                value[p] = gelu_and_slope(unit[a][p]);
            tile.write(hidden + (first + a) * PITCH, value);
        }
        __syncthreads();
        outer(second_layer, tile.group, upper + first * PITCH, hidden, TAPS + 1);
        multiply(grad, tile, fixup_w1 + first, 1, TAPS, upper, TAPS);
        __syncthreads();
#pragma unroll
        for (int a = 0; a < DIAMETER; a++) {
#pragma unroll
            for (int p = 0; p < PX; p++)
                value[p] = FIXUP_SCALE * grad[a][p] * unit[a][p];
            tile.write(hidden + (first + a) * PITCH, value);
            tile.read(grad[a], upper + (first + a) * PITCH);
        }
        __syncthreads();
        outer(first_layer, tile.group, hidden + first * PITCH, inputs, INPUTS + 1);
        multiply(grad, tile, fixup_w0 + first, 1, INPUTS, hidden, TAPS);
#pragma unroll 2
        for (int i = threadIdx.x; i < GUIDANCE * SIZE; i += KERNEL_THREADS) {
            const int channel = i / SIZE, pixel = i % SIZE;
            const int y = tile.top + pixel / Tile<PX>::WIDTH;
            const int x = tile.left + pixel % Tile<PX>::WIDTH;
            float sum = 0.f;
#pragma unroll 7
            for (int j = 0; j < TAPS; j++)
                sum += fixup_w0[j * INPUTS + TAPS + channel] * hidden[j * PITCH + pixel];
            if (y < H && x < W)
                grad_guidance[(b * GUIDANCE + channel) * plane + (long long)y * W + x] = sum;
        }

        // Through the softmax: dl = k dk - q sum(k dk), q being k, or e / sum(e) where floored.
        float inner[PX] = {}, k[PX];
#pragma unroll
        for (int a = 0; a < DIAMETER; a++) {
            tile.read(k, inputs + (first + a) * PITCH);
#pragma unroll
            for (int p = 0; p < PX; p++) {
                grad[a][p] *= k[p];
                inner[p] += grad[a][p];
            }
        }
        tile.write(upper + tile.slot * PITCH, inner);
        __syncthreads();
#pragma unroll
        for (int p = 0; p < PX; p++)
            inner[p] = 0.f;
        for (int i = 0; i < DIAMETER; i++) {
            tile.read(value, upper + i * PITCH);
#pragma unroll
            for (int p = 0; p < PX; p++)
                inner[p] += value[p];
        }
        __syncthreads();
#pragma unroll
        for (int a = 0; a < DIAMETER; a++) {
            const float square = row_square + (a - RADIUS) * (a - RADIUS);  // -log s = square * falloff
            tile.read(k, inputs + (first + a) * PITCH);
#pragma unroll
            for (int p = 0; p < PX; p++) {
                const float share = floored[p] ? own_logits[a * plane + p] : k[p];
                value[p] = grad[a][p] - share * inner[p];
                grad_sigma += square * (floored[p] ? grad[a][p] : value[p]);
                // Logits come back out of their exponentials, up to a constant: sum(dl) is zero.
                const float logit = logf(fmaxf(share, 1e-38f)) + (floored[p] ? 0.f : square * falloff);
                grad_temperature += value[p] * logit;
            }
            tile.write(upper + (first + a) * PITCH, value);
        }
        __syncthreads();
#pragma unroll 2
        for (int i = threadIdx.x; i < SIZE * TAPS; i += KERNEL_THREADS) {
            const int tap = i / SIZE, pixel = i % SIZE;
            const int y = tile.top + pixel / Tile<PX>::WIDTH;
            const int x = tile.left + pixel % Tile<PX>::WIDTH;
            const int dy = tap / DIAMETER - RADIUS, dx = tap % DIAMETER - RADIUS;
            if (y < H && x < W)
                grad_logits[(b * TAPS + tap) * plane + (long long)y * W + x] =
                    folded_tap(upper + pixel, y, x, dy, dx, H, W);
        }
    }
    partial += (long long)blockIdx.x * (TAPS * (INPUTS + 1) + TAPS * (TAPS + 1) + 2);
    const int group = threadIdx.x % GROUPS, first = DIAMETER * (threadIdx.x / GROUPS);
#pragma unroll
    for (int i = 0; i < DIAMETER; i++)
#pragma unroll
        for (int m = 0; m < 4; m++)
            second_layer[i][m] *= FIXUP_SCALE;
    write_layer(partial, first_layer, first, group, INPUTS + 1);
    write_layer(partial + TAPS * (INPUTS + 1), second_layer, first, group, TAPS + 1);
    partial += TAPS * (INPUTS + 1) + TAPS * (TAPS + 1);
    grad_sigma = sum_block<KERNEL_THREADS>(grad_sigma, upper);
    grad_temperature = sum_block<KERNEL_THREADS>(grad_temperature, upper);
    if (threadIdx.x == 0) {
        const float temperature = expf(*range_temp);
        const bool free = MIN_TEMPERATURE <= temperature && temperature <= MAX_TEMPERATURE;
        partial[0] = grad_sigma * 2.f * falloff / *sigma_spatial;  // d log s / d sigma = |t|^2 / sigma^3
        partial[1] = free ? grad_temperature : 0.f;
    }
}
// total[i] = sum_p partial[p][i]: eight threads to a column, each a row in eight.
extern "C" __global__ void __launch_bounds__(256) sum_partials(
    const float* __restrict__ partial, float* __restrict__ total, int P, int N)
{
    extern __shared__ __align__(16) float shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float sum = 0.f;
    if (column < N)
        for (int p = warp; p < P; p += 8)
            sum += partial[(long long)p * N + column];
    shared[warp * 32 + lane] = sum;
    __syncthreads();
    if (warp == 0 && column < N) {
        for (int i = 1; i < 8; i++)
            sum += shared[i * 32 + lane];
        total[column] = sum;
    }
}
