// The adjoint of jbu_kernel.cu: gradients of the ten weights and of the guidance.
//
// Everything is computed anew from guidance and projection, tile by tile; only the gradient of the
// 49 logits is stored. It is folded at the border (a tap that was mirrored counts for the pixel it
// read), so that pixel v sees the pairs it is part of at offset d = -3..3 alone:
//
//   dL/dp(v) = T sum_d [ dl_d(v) + dl_{-d}(v + d) ] p(v + d)
//
// Sums over pixels are deterministic: block i of P adds up its tiles in order, in registers, and
// writes one row; sum_partials adds the rows in order. No atomics.
//
// ABI
//
// Options and words as in jbu_kernel.cu; headers device.cuh, tile.cuh. On one stream, in this
// order, after range_forward has computed the projection again.
// P = min(256, B*ceil(H/2)*ceil(W/32)): sums do not depend on the device.
//
//   kernel_backward      PPPP PPP PPPP iii  guidance, projection, range_temp, sigma_spatial,
//                                        fixup_w0, fixup_b0, fixup_w1, grad_kernel (B,H,W,49),
//                                        out grad_logits (B,49,H,W), out grad_guidance (B,G,H,W),
//                                        out partial (P, N), B, H, W
//       grid (P, 1, 1)                   block 112    shared 272*(149+G) bytes
//       N = 49*(50+G) + 49*50 + 2: [fixup_w0 | fixup_b0] as (49, 50+G) rows, bias last;
//       [fixup_w1 | fixup_b1] as (49, 50) rows, bias last; sigma_spatial; range_temp.
//   projection_backward  PPPP ii         projection, range_temp, grad_logits,
//                                        out grad_projection (B,32,H,W), H, W
//       grid (ceil(W/32), ceil(H/4), B)  block 128    shared 0
//   range_backward       PPPP PPP ii     guidance, range_w0, range_b0, range_w1, grad_projection,
//                                        io grad_guidance, out partial (P, M), pixels = H*W, B
//       grid (P, 1, 1)                   block 128    shared 272*(98+G) bytes
//       M = 32*(G+1) + 32*33: [range_w0 | range_b0] as (32, G+1) rows, bias last;
//       [range_w1 | range_b1] as (32, 33) rows, bias last.
//   sum_partials         PP ii           partial (P, N), out total (N), P, N
//       grid (ceil(N/32), 1, 1)          block 256    shared 1024

#include "tile.cuh"

constexpr int PX = 4;
constexpr int PITCH = Tile<PX>::PITCH, SIZE = Tile<PX>::SIZE, GROUPS = Tile<PX>::GROUPS;
constexpr int INPUTS = TAPS + GUIDANCE;

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
