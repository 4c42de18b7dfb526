// CUDA C++ as plain C++: included before a kernel's source, it runs a grid on one CPU thread.
//
// A block's threads are fibers. A warp runs until it reaches a barrier or ends, then the next, in an
// order the caller chooses: what one order hides (a thread reading what a later one writes, or a
// faster one has overwritten) another shows. Shared memory is NaN before every block and guarded
// behind its end; a barrier that only some threads reach, or a warp's matrix product that only some
// lanes reach, is an error, and so is what a device does
// not forgive: misaligned vectors, indices beyond an array, overflowing 32-bit offsets (found by
// the compiler's checks, whose handlers are at the end of this file).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __syncthreads() emulator::barrier(__FILE__, __LINE__)
#define __syncwarp(...) emulator::meet(__FILE__, __LINE__)

using std::max;
using std::min;

struct float4 {
    float x, y, z, w;
} __align__(16);

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

// What ptx.cuh says in the machine's words.
#define FEATUP_HUB_PTX_CUH
inline float half_to_float(unsigned short bits) { return std::bit_cast<_Float16>(bits); }
inline unsigned short float_to_half(float value) { return std::bit_cast<unsigned short>((_Float16)value); }
inline float bfloat_to_float(unsigned short bits) { return std::bit_cast<float>((unsigned)bits << 16); }
inline unsigned short float_to_bfloat(float value)
{
    const unsigned bits = std::bit_cast<unsigned>(value);
    return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned floats_to_halfs(float low, float high)
{
    return float_to_half(low) | (unsigned)float_to_half(high) << 16;
}
inline unsigned floats_to_bfloats(float low, float high)
{
    return float_to_bfloat(low) | (unsigned)float_to_bfloat(high) << 16;
}

inline void opaque(unsigned&) {}

namespace emulator {

constexpr size_t SHARED_FLOATS = 48 * 1024 / 4, GUARD_FLOATS = 1024, STACK_BYTES = 256 * 1024;
constexpr unsigned POISON = 0x7fc0dead, GUARD = 0x7fc0beef;  // both NaN

constexpr int WARP = 32, WORDS = 6, MEETING = -1;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    int waits_at = 0;  // line of a barrier; MEETING of its warp; 0 where it does not wait
    bool ended = false;
    unsigned meetings = 0;
};

// What the lanes of a warp hand each other; two of them in turn, as some lanes are ahead by one.
struct Exchange {
    unsigned words[2][WARP][WORDS];
};

// How to run, set by the caller.
struct Mode {
    int order = 0;           // of threads and blocks: 0 ascending, 1 descending, else shuffled
    const char* file = "";   // the barrier that is left out, to see whether anybody notices
    int line = 0;
    bool alone = false;      // run one block only
    Index block = {};
};

static Mode mode;
static std::string fault;
static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static std::vector<Exchange> warps;
static Fiber* running;
static void (*enter)();

inline void report(const std::string& what)
{
    if (fault.empty())
        fault = what + " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
                ", " + std::to_string(blockIdx.z) + ", thread " + std::to_string(threadIdx.x) + ")";
}

inline bool left_out(const char* file, int line)
{
    return line == mode.line && !strcmp(file, mode.file);
}

inline void barrier(const char* file, int line)
{
    if (left_out(file, line))
        return;
    running->waits_at = line;
    swapcontext(&running->context, &scheduler);
}

// Hands a lane's words to its warp, which has to meet here; returns everybody's.
inline auto exchange(const unsigned (&mine)[WORDS])
{
    unsigned(*words)[WORDS] = warps[threadIdx.x / WARP].words[running->meetings++ % 2];
    std::copy(mine, mine + WORDS, words[threadIdx.x % WARP]);
    running->waits_at = MEETING;
    swapcontext(&running->context, &scheduler);
    return words;
}

inline void meet(const char* file, int line)
{
    if (!left_out(file, line))
        exchange({});
}

// A sum as tensor cores keep it: cut, not rounded.
inline float cut(double sum)
{
    const float rounded = sum;
    const bool beyond = std::abs(rounded) > std::abs(sum) && !std::isinf(rounded);
    return beyond ? std::nextafter(rounded, 0.f) : rounded;
}

// mma.m16n8k16, by the tables of the PTX ISA. A device adds the products in an order of its own.
template <float (*WIDEN)(unsigned short)>
void multiply(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    const auto words = exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
    const int lane = threadIdx.x % WARP;
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double total = sum[i];
        for (int k = 0; k < 16; k++) {
            const unsigned left = words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const unsigned right = words[column * 4 + k % 8 / 2][4 + k / 8];
            total += (double)WIDEN(left >> (k % 2 * 16)) * WIDEN(right >> (k % 2 * 16));
        }
        sum[i] = cut(total);
    }
}

// mma.m16n8k8 of TF32 numbers, likewise. What the lower 13 bits of an operand do is undefined.
inline void multiply_tf32(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    for (unsigned word : {a[0], a[1], a[2], a[3], b[0], b[1]})
        if (word & 0x1fff)
            report("an operand is no TF32 number");
    const auto words = exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
    const int group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        const int row = i < 2 ? group : group + 8, column = member * 2 + (i & 1);
        double total = sum[i];
        for (int k = 0; k < 8; k++) {
            const unsigned left = words[row % 8 * 4 + k % 4][(row >= 8) + 2 * (k >= 4)];
            const unsigned right = words[column * 4 + k % 4][4 + (k >= 4)];
            total += (double)std::bit_cast<float>(left) * std::bit_cast<float>(right);
        }
        sum[i] = cut(total);
    }
}

inline float shuffle(float mine, unsigned lane)
{
    return std::bit_cast<float>(exchange({std::bit_cast<unsigned>(mine)})[lane][0]);
}

inline bool all(bool mine)
{
    const auto words = exchange({mine});
    return std::all_of(words, words + WARP, [](const unsigned* lane) { return lane[0]; });
}

static void fiber_main()
{
    enter();
    running->ended = true;
    swapcontext(&running->context, &scheduler);
}

}  // namespace emulator

inline bool __all_sync(unsigned, bool mine) { return emulator::all(mine); }
inline float __shfl_xor_sync(unsigned, float mine, int distance)
{
    return emulator::shuffle(mine, threadIdx.x % emulator::WARP ^ distance);
}

alignas(16) static float shared[emulator::SHARED_FLOATS + emulator::GUARD_FLOATS];

namespace emulator {

inline void run_block(unsigned threads, size_t shared_bytes, std::vector<unsigned> order,
                      std::mt19937& random)
{
    const size_t floats = shared_bytes / 4;
    for (size_t i = 0; i < SHARED_FLOATS + GUARD_FLOATS; i++)
        shared[i] = std::bit_cast<float>(i < floats ? POISON : GUARD);
    for (unsigned t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        fiber.ended = false;
        fiber.meetings = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
    }
    const auto run = [](unsigned t) {
        running = &fibers[t];
        running->waits_at = 0;
        threadIdx = {t, 0, 0};
        swapcontext(&scheduler, &running->context);
    };
    const auto ended = [](const Fiber& fiber) { return fiber.ended; };
    const auto meets = [](const Fiber& fiber) { return !fiber.ended && fiber.waits_at == MEETING; };
    while (!std::all_of(fibers.begin(), fibers.begin() + threads, ended)) {
        if (mode.order > 1)  // anew between any two barriers
            std::shuffle(order.begin(), order.end(), random);
        std::vector<bool> ran(threads / WARP);
        for (unsigned next : order) {
            if (ran[next / WARP])
                continue;
            // A warp runs to its barrier, past all meetings of its own, before another one starts.
            ran[next / WARP] = true;
            const auto lanes = fibers.begin() + next / WARP * WARP, end = lanes + WARP;
            do {
                for (unsigned t : order)
                    if (t / WARP == next / WARP && !fibers[t].ended)
                        run(t);
                if (std::any_of(lanes, end, meets) && !std::all_of(lanes, end, meets))
                    report("a warp's lanes do not all take part in a product");
                if (!fault.empty())
                    return;
            } while (std::any_of(lanes, end, meets));
        }
        // A device does not wait for threads that have ended; here only whole warps may have.
        int line = 0;
        for (unsigned t : order)
            if (!fibers[t].ended)
                line = fibers[t].waits_at;
        for (unsigned t = 0; t < threads; t++) {
            const auto lanes = fibers.begin() + t / WARP * WARP;
            if (std::all_of(lanes, lanes + WARP, ended))
                continue;
            if (fibers[t].ended || fibers[t].waits_at != line)
                report("threads of a block meet at different barriers, line " +
                       std::to_string(line) + " and line " + std::to_string(fibers[t].waits_at));
        }
        if (!fault.empty())
            return;
    }
    for (size_t i = floats; i < SHARED_FLOATS + GUARD_FLOATS; i++)
        if (std::bit_cast<unsigned>(shared[i]) != GUARD)
            return report("shared memory was written behind its end, float " + std::to_string(i) +
                          " of " + std::to_string(floats));
}

inline void run_grid(Index grid, unsigned threads, size_t shared_bytes)
{
    std::mt19937 random(mode.order);
    if (fibers.size() < threads)
        fibers.resize(threads);
    warps.resize(threads / WARP);
    const size_t count = mode.alone ? 1 : (size_t)grid.x * grid.y * grid.z;
    std::vector<unsigned> turns(threads), blocks(count);
    for (std::vector<unsigned>* list : {&turns, &blocks}) {
        for (size_t i = 0; i < list->size(); i++)
            (*list)[i] = mode.order == 1 ? list->size() - 1 - i : i;
        if (mode.order > 1)
            std::shuffle(list->begin(), list->end(), random);
    }
    gridDim = grid;
    blockDim = {threads, 1, 1};
    for (unsigned b : blocks) {
        blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        if (mode.alone)
            blockIdx = mode.block;
        run_block(threads, shared_bytes, turns, random);
        if (!fault.empty())
            return;
    }
}

// Calls a kernel with the addresses of its arguments, as cuLaunchKernel is given them.
template <auto KERNEL>
struct Entry;

template <typename... Types, void (*KERNEL)(Types...)>
struct Entry<KERNEL> {
    static inline void** arguments;
    template <size_t... I>
    static void call(std::index_sequence<I...>)
    {
        KERNEL(*static_cast<Types*>(arguments[I])...);
    }
    static void enter() { call(std::index_sequence_for<Types...>()); }
};

template <auto KERNEL>
const char* launch(Index grid, unsigned threads, size_t shared_bytes, void** arguments)
{
    fault.clear();
    Entry<KERNEL>::arguments = arguments;
    enter = Entry<KERNEL>::enter;
    if (shared_bytes > 4 * SHARED_FLOATS)
        report("more than 48 KB of shared memory asked for");
    else if (threads % WARP)
        report("a block of whole warps is needed");
    else
        run_grid(grid, threads, shared_bytes);
    return fault.c_str();
}

extern "C" void configure(int order, const char* file, int line, int alone, unsigned x, unsigned y,
                          unsigned z)
{
    mode = {order, file, line, alone != 0, {x, y, z}};
}

// The compiler's checks call these; every one is given the place first.
struct Place {
    const char* file;
    uint32_t line, column;
};

inline void report(const char* what, const void* place)
{
    const Place* at = static_cast<const Place*>(place);
    report(std::string(what) + " at " + at->file + ":" + std::to_string(at->line));
}

}  // namespace emulator

inline void multiply_halfs(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    emulator::multiply<half_to_float>(sum, a, b);
}
inline void multiply_tf32(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    emulator::multiply_tf32(sum, a, b);
}
inline void multiply_bfloats(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2])
{
    emulator::multiply<bfloat_to_float>(sum, a, b);
}

#define CHECK(handler, what, ...) \
    extern "C" void __ubsan_handle_##handler(void* place, ##__VA_ARGS__) { emulator::report(what, place); }
CHECK(type_mismatch_v1, "misaligned or null address", uintptr_t)
CHECK(out_of_bounds, "index out of bounds", uintptr_t)
CHECK(add_overflow, "integer overflow", uintptr_t, uintptr_t)
CHECK(sub_overflow, "integer overflow", uintptr_t, uintptr_t)
CHECK(mul_overflow, "integer overflow", uintptr_t, uintptr_t)
CHECK(negate_overflow, "integer overflow", uintptr_t)
CHECK(divrem_overflow, "division by zero", uintptr_t, uintptr_t)
CHECK(shift_out_of_bounds, "shift out of bounds", uintptr_t, uintptr_t)
