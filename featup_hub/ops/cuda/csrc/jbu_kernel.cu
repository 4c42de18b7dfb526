// Guidance -> one 7x7 kernel per pixel. Matches reference.jbu_kernel.
//
//   p(u)   = W1 gelu(W0 g(u) + b0) + b1                              range_forward
//   k_t(u) = e_t s_t / max(sum_t e_t s_t, 1e-7 sum_t e_t),  e_t = exp(T <p(u), p(u + t)>),
//            s_t = exp(-|t|^2 / 2 sigma^2), p mirrored at the border
//   out(u) = k + 0.1 (V1 gelu(V0 [k, g] + c0) + c1)                  kernel_forward
//
// Logits and hidden units stay in registers and in one tile's shared memory.
//
// ABI
//
// Options: -DJBU_GUIDANCE=G (guidance channels, 1..14; default 3), --std=c++17, no fast math.
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
//       grid (ceil(W/32), ceil(H/4), B)  block 224    shared 768*(49+G) bytes

#include "device.cuh"

#ifndef JBU_GUIDANCE
#define JBU_GUIDANCE 3
#endif

constexpr int GUIDANCE = JBU_GUIDANCE;
constexpr int KEYS = 32;
constexpr float MIN_TEMPERATURE = 1e-4f, MAX_TEMPERATURE = 1e4f;
constexpr float MIN_SUM = 1e-7f;
constexpr float FIXUP_SCALE = 0.1f;

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

// A block's tile: 4 rows of 32 pixels. A warp owns one row of taps, or as many hidden units, so
// that all of its lanes need the same weights; a lane owns four neighbouring pixels. Operands of
// all warps are in shared memory, [channel][pixel].
constexpr int PX = 4, GROUPS = 32, WIDTH = 32, HEIGHT = GROUPS * PX / WIDTH, SIZE = GROUPS * PX;
constexpr int PITCH = SIZE + 4;
constexpr int THREADS = GROUPS * DIAMETER;
constexpr int INPUTS = TAPS + GUIDANCE;
// A layer's weights in shared memory, [input][row of seven, padded to eight], plus four floats
// against bank conflicts.
constexpr int WEIGHT_PITCH = 8 * DIAMETER + 4;

constexpr int KEY_CHUNK = 8;    // channels of the projection in shared memory at a time
constexpr int KEY_ROWS = HEIGHT + 2 * RADIUS, KEY_PITCH = 40;

// Shared memory: weights; and, in turn, keys, exchange of the softmax, [k, g], hidden units, result.
constexpr int OPERAND_FLOATS = INPUTS * PITCH;
static_assert((OPERAND_FLOATS + INPUTS * WEIGHT_PITCH) * sizeof(float) == 768 * (49 + GUIDANCE),
              "the launcher's number");
static_assert(KEY_CHUNK * KEY_ROWS * KEY_PITCH <= OPERAND_FLOATS, "keys fit");
static_assert(3 * DIAMETER * PITCH <= OPERAND_FLOATS, "the exchange fits");
static_assert(SIZE * TAPS <= OPERAND_FLOATS, "the result fits");

struct Tile {
    const int group = threadIdx.x % GROUPS, slot = threadIdx.x / GROUPS;
    const int y = group * PX / WIDTH, x = group * PX % WIDTH;  // of the first pixel, in the tile
    const int top = blockIdx.y * HEIGHT, left = blockIdx.x * WIDTH;

    __device__ void read(float (&value)[PX], const float* channel) const
    {
        load4(value, channel + PX * group);
    }
    __device__ void write(float* channel, const float (&value)[PX]) const
    {
        store4(channel + PX * group, value);
    }
};

// Copies a layer's weights, (49, count) row-major; a warp those of its own seven units.
static __device__ __forceinline__ void load_layer(
    float* to, const Tile& tile, const float* __restrict__ weight, int count)
{
    static_assert(INPUTS <= 64, "two inputs a lane");
    float value[DIAMETER][2] = {};
#pragma unroll
    for (int a = 0; a < DIAMETER; a++)
#pragma unroll
        for (int k = 0; k < 2; k++)
            if (tile.group + 32 * k < count)
                value[a][k] = weight[(DIAMETER * tile.slot + a) * count + tile.group + 32 * k];
#pragma unroll
    for (int a = 0; a < DIAMETER; a++)
#pragma unroll
        for (int k = 0; k < 2; k++)
            if (tile.group + 32 * k < count)
                to[(tile.group + 32 * k) * WEIGHT_PITCH + 8 * tile.slot + a] = value[a][k];
}

// sum[a] += sum_i weight[i][a] * operand[i], for the thread's pixels and its seven units.
static __device__ __forceinline__ void multiply(
    float (&sum)[DIAMETER][PX], const Tile& tile, const float* weight, const float* operand,
    int count)
{
#pragma unroll 4
    for (int i = 0; i < count; i++) {
        float value[PX], w[8];
        tile.read(value, operand + i * PITCH);
        load4(w, weight + i * WEIGHT_PITCH + 8 * tile.slot);
        load4(w + 4, weight + i * WEIGHT_PITCH + 8 * tile.slot + 4);
#pragma unroll
        for (int a = 0; a < DIAMETER; a++)
#pragma unroll
            for (int p = 0; p < PX; p++)
                sum[a][p] += w[a] * value[p];
    }
}

// logit[a] = <p_0, p_t> for the thread's pixels and its row of taps, t = (slot, a).
static __device__ __forceinline__ void match(
    float (&logit)[DIAMETER][PX], const Tile& tile, const float* __restrict__ projection,
    float* keys, int H, int W)
{
    constexpr int COLUMNS = WIDTH + 2 * RADIUS;
    constexpr int SHARE = (KEY_ROWS * COLUMNS + THREADS - 1) / THREADS;
    int from[SHARE], to[SHARE];
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int row = (threadIdx.x + i * THREADS) / COLUMNS;
        const int column = (threadIdx.x + i * THREADS) % COLUMNS;
        from[i] = reflect(tile.top + row - RADIUS, H) * W + reflect(tile.left + column - RADIUS, W);
        to[i] = row < KEY_ROWS ? row * KEY_PITCH + column + 1 : -1;
    }
#pragma unroll
    for (int a = 0; a < DIAMETER; a++)
#pragma unroll
        for (int p = 0; p < PX; p++)
            logit[a][p] = 0.f;

    const long long plane = (long long)H * W;
    for (int c = 0; c < KEYS; c += KEY_CHUNK) {
        __syncthreads();
#pragma unroll
        for (int k = 0; k < KEY_CHUNK; k++)
#pragma unroll
            for (int i = 0; i < SHARE; i++)
                if (to[i] >= 0)
                    keys[k * KEY_ROWS * KEY_PITCH + to[i]] = projection[(c + k) * plane + from[i]];
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < KEY_CHUNK; k++) {
            const float* line = keys + (k * KEY_ROWS + tile.y) * KEY_PITCH + tile.x;
            float centre[PX], near[PX + 8];  // near[1 + i] is i - RADIUS to the right of centre[0]
            load4(centre, line + RADIUS * KEY_PITCH + RADIUS + 1);
#pragma unroll
            for (int i = 0; i < PX + 8; i += 4)
                load4(near + i, line + tile.slot * KEY_PITCH + i);
#pragma unroll
            for (int a = 0; a < DIAMETER; a++)
#pragma unroll
                for (int p = 0; p < PX; p++)
                    logit[a][p] += centre[p] * near[1 + a + p];
        }
    }
    __syncthreads();
}

// Turns logits into k_t; `exchange` holds 3 x 7 channels.
static __device__ __forceinline__ void soften(
    float (&taps)[DIAMETER][PX], const Tile& tile, const float* range_temp,
    const float* sigma_spatial, float* exchange)
{
    const float temperature = fminf(fmaxf(expf(*range_temp), MIN_TEMPERATURE), MAX_TEMPERATURE);
    const float sigma = *sigma_spatial;
    float top[PX], all[PX] = {}, kept[PX] = {}, other[PX], spatial[DIAMETER];
#pragma unroll
    for (int p = 0; p < PX; p++) {
        top[p] = taps[0][p];
#pragma unroll
        for (int a = 1; a < DIAMETER; a++)
            top[p] = fmaxf(top[p], taps[a][p]);
    }
    tile.write(exchange + tile.slot * PITCH, top);
    __syncthreads();
    for (int i = 0; i < DIAMETER; i++) {
        tile.read(other, exchange + i * PITCH);
#pragma unroll
        for (int p = 0; p < PX; p++)
            top[p] = fmaxf(top[p], other[p]);
    }
#pragma unroll
    for (int a = 0; a < DIAMETER; a++) {
        const float v = (tile.slot - RADIUS) / float(RADIUS), u = (a - RADIUS) / float(RADIUS);
        spatial[a] = expf(-(v * v + u * u) / (2.f * sigma * sigma));
#pragma unroll
        for (int p = 0; p < PX; p++) {
            taps[a][p] = expf(temperature * (taps[a][p] - top[p]));
            all[p] += taps[a][p];
            kept[p] += taps[a][p] * spatial[a];
        }
    }
    tile.write(exchange + (DIAMETER + tile.slot) * PITCH, all);
    tile.write(exchange + (2 * DIAMETER + tile.slot) * PITCH, kept);
    __syncthreads();
#pragma unroll
    for (int p = 0; p < PX; p++)
        all[p] = kept[p] = 0.f;
    for (int i = 0; i < DIAMETER; i++) {
        tile.read(other, exchange + (DIAMETER + i) * PITCH);
#pragma unroll
        for (int p = 0; p < PX; p++)
            all[p] += other[p];
        tile.read(other, exchange + (2 * DIAMETER + i) * PITCH);
#pragma unroll
        for (int p = 0; p < PX; p++)
            kept[p] += other[p];
    }
#pragma unroll
    for (int p = 0; p < PX; p++) {
        const float scale = 1.f / fmaxf(kept[p], MIN_SUM * all[p]);
#pragma unroll
        for (int a = 0; a < DIAMETER; a++)
            taps[a][p] *= spatial[a] * scale;
    }
    __syncthreads();
}

// One thread: four pixels in a row times seven taps, or seven hidden units.
extern "C" __global__ void __launch_bounds__(THREADS, 2) kernel_forward(
    const float* __restrict__ guidance, const float* __restrict__ projection,
    const float* __restrict__ range_temp, const float* __restrict__ sigma_spatial,
    const float* __restrict__ fixup_w0, const float* __restrict__ fixup_b0,
    const float* __restrict__ fixup_w1, const float* __restrict__ fixup_b1,
    float* __restrict__ kernel, int H, int W)
{
    extern __shared__ __align__(16) float shared[];
    float* layer = shared + OPERAND_FLOATS;
    const Tile tile;
    const long long plane = (long long)H * W;
    guidance += blockIdx.z * GUIDANCE * plane;
    projection += blockIdx.z * KEYS * plane;
    kernel += blockIdx.z * plane * TAPS;

    load_layer(layer, tile, fixup_w0, INPUTS);
    float k[DIAMETER][PX], sum[DIAMETER][PX], value[PX];
    match(k, tile, projection, shared, H, W);
    soften(k, tile, range_temp, sigma_spatial, shared);

    const int first = DIAMETER * tile.slot;
#pragma unroll
    for (int a = 0; a < DIAMETER; a++) {
#pragma unroll
        for (int p = 0; p < PX; p++)
            sum[a][p] = fixup_b0[first + a];
        tile.write(shared + (first + a) * PITCH, k[a]);
    }
    for (int i = threadIdx.x; i < GUIDANCE * SIZE; i += THREADS) {
        const int channel = i / SIZE, pixel = i % SIZE;
        const int y = clamp(tile.top + pixel / WIDTH, H), x = clamp(tile.left + pixel % WIDTH, W);
        shared[(TAPS + channel) * PITCH + pixel] = guidance[channel * plane + (long long)y * W + x];
    }
    __syncthreads();
    multiply(sum, tile, layer, shared, INPUTS);
    __syncthreads();
    load_layer(layer, tile, fixup_w1, TAPS);
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
    multiply(sum, tile, layer, shared, TAPS);
    __syncthreads();
    // Every fourth pixel is in a separate row, so that a warp's lanes write to different banks.
#pragma unroll
    for (int a = 0; a < DIAMETER; a++)
#pragma unroll
        for (int p = 0; p < PX; p++)
            shared[(p * GROUPS + tile.group) * TAPS + first + a] = k[a][p] + FIXUP_SCALE * sum[a][p];
    __syncthreads();

    // A row of the tile is contiguous in memory: pixels follow one another, taps within.
    const int width = min(WIDTH, W - tile.left) * TAPS;
    for (int y = 0; y < min(HEIGHT, H - tile.top); y++) {
        float* line = kernel + ((long long)(tile.top + y) * W + tile.left) * TAPS;
        for (int i = threadIdx.x; i < width; i += THREADS) {
            const int x = i / TAPS;
            line[i] = shared[(x % PX * GROUPS + (y * WIDTH + x) / PX) * TAPS + i % TAPS];
        }
    }
}
