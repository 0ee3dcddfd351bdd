// CUDA kernels on the CPU: one block after the other, one fiber a thread, for tests of what a kernel computes.
//
// Barriers and warp-wide operations are rendezvous points between fibers. What a GPU would forgive or hang on is an
// error here: a barrier that not all threads reach, a warp operation that some lanes skip, shared memory read before
// cp.async was waited for (it is copied only then).
//
// Where kernels spend their time (the pragmas) is optimized also where they are not, since compiling takes longer.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
#include <ucontext.h>
#include <sched.h>
#include <ctime>

#define __global__
#define __device__
#define __forceinline__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static
#define __CUDA_ARCH_FEAT_SM90_ALL
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN

struct Dim3 { int x, y, z; };
static Dim3 blockIdx, threadIdx, blockDim, gridDim;
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
static inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
static inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
static inline float2 make_float2(float a, float b) { return {a, b}; }

typedef _Float16 half;
static inline half __float2half_rn(float x) { return (half)x; }
static inline float __half2float(half x) { return (float)x; }
template <typename T> static inline T max(T a, T b) { return a > b ? a : b; }
template <typename T> static inline T min(T a, T b) { return a < b ? a : b; }
static inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

alignas(1024) static unsigned char emulated_dynamic[232448];  // shared memory that is given at launch

namespace emulator {
constexpr int kStack = 256 << 10, kLanes = 32;
enum State { kReady, kBarrier, kWarp, kPhase, kDone };
struct Phase { uint16_t count, left; uint32_t number; };  // of a barrier in shared memory
struct Copy { void *to; const void *from; bool valid; };
struct Store { void *to; const void *from; size_t bytes; };  // done when it is waited for
struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool begun = false;
  State state = kReady;
  int number = 0, turn = 0;
  Phase *phase = nullptr;
  int parity = 0;
  std::vector<Copy> pending;
  std::vector<std::vector<Copy>> groups;
  std::vector<Store> stores;
};
struct Exchange { unsigned words[2][kLanes][8]; };
static std::vector<Fiber> fibers;
static std::vector<Exchange> exchanges;
static char *stacks = nullptr;
static Fiber *current;
static jmp_buf scheduler;
static void (*body)(void *);
static void *arguments;

[[noreturn]] static void fail(const char *what) {
  std::fprintf(stderr, "emulator: %s (block %d %d %d, thread %d)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               current ? current->number : -1);
  std::abort();
}
#pragma GCC push_options
#pragma GCC optimize("O2")
static void yield(State state) {
  current->state = state;
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}
static void entry() {
  for (;;) {  // a fiber lives on from block to block
    body(arguments);
    if (!current->pending.empty()) fail("cp.async that was never committed");
    if (!current->stores.empty()) fail("a store in one go that was never waited for");
    yield(kDone);
  }
}
static void resume(Fiber &fiber) {
  current = &fiber;
  threadIdx = {fiber.number, 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}
static bool release(size_t first, size_t count, State state) {
  size_t waiting = 0, done = 0;
  for (size_t i = first; i < first + count; ++i) {
    waiting += fibers[i].state == state;
    done += fibers[i].state == kDone;
  }
  if (waiting == 0 || waiting + done < count) return false;
  if (state == kWarp && done) fail("a warp operation after some lanes have returned");
  for (size_t i = first; i < first + count; ++i)
    if (fibers[i].state == state) fibers[i].state = kReady;
  return true;
}
static bool pass_phases() {
  bool passed = false;
  for (Fiber &fiber : fibers)
    if (fiber.state == kPhase && (int)(fiber.phase->number & 1) != fiber.parity) fiber.state = kReady, passed = true;
  return passed;
}
#pragma GCC pop_options
static void prepare(int threads) {
  fibers.assign(threads, Fiber());
  exchanges.resize((threads + kLanes - 1) / kLanes);
  std::free(stacks);
  stacks = (char *)std::malloc((size_t)threads * kStack);  // only what is used of it becomes memory
  for (int i = 0; i < threads; ++i) {
    Fiber &fiber = fibers[i];
    fiber.number = i;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = &stacks[(size_t)i * kStack];
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, entry, 0);
  }
}
#pragma GCC push_options
#pragma GCC optimize("O2")
static void run_block(int threads) {
  if (fibers.size() != (size_t)threads) prepare(threads);
  for (Fiber &fiber : fibers) fiber.state = kReady, fiber.turn = 0, fiber.groups.clear();
  for (;;) {
    size_t done = 0;
    bool advanced = false;
    for (Fiber &fiber : fibers) {
      if (fiber.state == kReady) resume(fiber), advanced = true;
      done += fiber.state == kDone;
    }
    if (done == fibers.size()) return;
    for (int warp = 0; warp * kLanes < threads; ++warp) {
      int lanes = threads - warp * kLanes < kLanes ? threads - warp * kLanes : kLanes;
      advanced |= release(warp * kLanes, lanes, kWarp);
    }
    advanced |= release(0, threads, kBarrier);
    advanced |= pass_phases();
    if (!advanced) fail("threads wait for each other at different places");
  }
}
// Give words to the other lanes of the warp and get theirs.
static unsigned (*exchange(const unsigned *words, int count))[8] {
  Exchange &own = exchanges[current->number / kLanes];
  int turn = current->turn++ & 1;
  std::memcpy(own.words[turn][current->number % kLanes], words, 4 * count);
  yield(kWarp);
  return own.words[turn];
}
#pragma GCC pop_options
static void finish(std::vector<Copy> &copies) {
  for (Copy &copy : copies) {
    if (copy.valid) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
  }
}
}  // namespace emulator

extern "C" void moec_emulate(void (*body)(void *), void *arguments, const int64_t *grid, int threads) {
  emulator::body = body, emulator::arguments = arguments;
  blockDim = {threads, 1, 1}, gridDim = {(int)grid[0], (int)grid[1], (int)grid[2]};
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0]; ++x) blockIdx = {x, y, z}, emulator::run_block(threads);
}

static inline void __syncthreads() { emulator::yield(emulator::kBarrier); }

// The primitives of compiler/kernels/cuda/primitives.cuh.
static inline void moec_blocks_at_once(int) {}
static inline void moec_wait_previous() {}
static inline void moec_launch_next() {}
static inline unsigned emulated_bf16(float x) {
  unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}
static inline unsigned emulated_f16(float x) {
  _Float16 y = (_Float16)x;
  uint16_t bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}
static inline float emulated_f16_to_f32(unsigned bits) {
  uint16_t word = (uint16_t)bits;
  _Float16 y;
  std::memcpy(&y, &word, 2);
  return (float)y;
}
static inline unsigned moec_pack_bf16(float low, float high) { return emulated_bf16(low) | emulated_bf16(high) << 16; }
static inline unsigned moec_pack_f16(float low, float high) { return emulated_f16(low) | emulated_f16(high) << 16; }
static inline float moec_low_bf16(unsigned pair) { return __uint_as_float(pair << 16); }
static inline float moec_high_bf16(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
static inline float moec_low_f16(unsigned pair) { return emulated_f16_to_f32(pair & 0xffffu); }
static inline float moec_high_f16(unsigned pair) { return emulated_f16_to_f32(pair >> 16); }
static inline unsigned emulated_halves(unsigned a, unsigned b, unsigned c, float (*each)(float, float, float)) {
  float low = each(moec_low_f16(a), moec_low_f16(b), moec_low_f16(c));
  return moec_pack_f16(low, each(moec_high_f16(a), moec_high_f16(b), moec_high_f16(c)));
}
static inline unsigned moec_sub_f16x2(unsigned a, unsigned b) {
  return emulated_halves(a, b, 0, [](float x, float y, float) { return x - y; });
}
static inline unsigned moec_mul_f16x2(unsigned a, unsigned b) {
  return emulated_halves(a, b, 0, [](float x, float y, float) { return x * y; });
}
static inline unsigned moec_fma_f16x2(unsigned a, unsigned b, unsigned c) {
  return emulated_halves(a, b, c, [](float x, float y, float z) { return std::fma(x, y, z); });
}
static inline void moec_hold_words(unsigned *) {}
static inline unsigned moec_held(unsigned constant) { return constant; }
static inline float moec_clamp(float x, float largest) { return x > largest ? largest : x < -largest ? -largest : x; }
static inline float moec_exp2(float x) { return std::exp2(x); }
static inline float moec_reciprocal(float x) { return 1 / x; }
static inline float moec_times(float x, float y) { return x * y; }
static inline float moec_exp(float x) { return std::exp(x); }
static inline void emulated_aligned(const void *place) {
  if ((uintptr_t)place % 16) emulator::fail("a 16-byte access at an address that is no multiple of 16");
}
static inline void moec_load_16(unsigned *to, const void *from) { emulated_aligned(from), std::memcpy(to, from, 16); }
static inline void moec_load_stream(unsigned *to, const void *from) { moec_load_16(to, from); }
static inline void moec_load_16_if(unsigned *to, const void *from, bool valid) {
  if (valid) moec_load_16(to, from);
  else std::memset(to, 0, 16);
}
static inline long long moec_address(const void *place) { return (long long)(uintptr_t)place; }
static inline void moec_stream_16(unsigned *to, long long address) { moec_load_16(to, (const void *)(uintptr_t)address); }
static inline void moec_stream_16_if(unsigned *to, long long address, bool valid) {
  moec_load_16_if(to, (const void *)(uintptr_t)address, valid);
}
template <typename Word> static inline unsigned emulated_fetch(long long address, bool valid) {
  if (!valid) return 0;
  if (address % sizeof(Word)) emulator::fail("an access at an address that is no multiple of its size");
  return *(const Word *)(uintptr_t)address;
}
static inline unsigned moec_fetch_1_if(long long address, bool valid) { return emulated_fetch<uint8_t>(address, valid); }
static inline unsigned moec_fetch_2_if(long long address, bool valid) { return emulated_fetch<uint16_t>(address, valid); }
static inline unsigned moec_fetch_4_if(long long address, bool valid) { return emulated_fetch<uint32_t>(address, valid); }
static inline void moec_prefetch_l2(const void *) {}
static inline void moec_store_16(void *to, unsigned a, unsigned b, unsigned c, unsigned d) {
  unsigned words[4] = {a, b, c, d};
  emulated_aligned(to), std::memcpy(to, words, 16);
}
static inline void moec_store_8(void *to, unsigned a, unsigned b) {
  unsigned words[2] = {a, b};
  if ((uintptr_t)to % 8) emulator::fail("an 8-byte access at an address that is no multiple of 8");
  std::memcpy(to, words, 8);
}
static inline void moec_store_4(void *to, unsigned value) {
  if ((uintptr_t)to % 4) emulator::fail("a 4-byte access at an address that is no multiple of 4");
  std::memcpy(to, &value, 4);
}
static inline void moec_store_pair(void *to, float a, float b) {
  float pair[2] = {a, b};
  if ((uintptr_t)to % 8) emulator::fail("an 8-byte access at an address that is no multiple of 8");
  std::memcpy(to, pair, 8);
}
static inline void moec_copy_async_16_if(void *shared, const void *global, bool valid) {
  emulated_aligned(shared), emulated_aligned(global);
  std::memset(shared, 0xff, 16);  // not there before it is waited for
  emulator::current->pending.push_back({shared, global, valid});
}
static inline void moec_copy_async_16(void *shared, const void *global) { moec_copy_async_16_if(shared, global, true); }
static inline void moec_copy_stream_16(void *shared, long long address) {
  moec_copy_async_16(shared, (const void *)(uintptr_t)address);
}
static inline void moec_copy_stream_16_if(void *shared, long long address, bool valid) {
  moec_copy_async_16_if(shared, (const void *)(uintptr_t)address, valid);
}
static inline void moec_copy_commit() {
  emulator::current->groups.push_back(std::move(emulator::current->pending));
  emulator::current->pending.clear();
}
static inline void moec_copy_wait(int groups) {
  auto &all = emulator::current->groups;
  size_t finished = all.size() > (size_t)groups ? all.size() - groups : 0;
  for (size_t i = 0; i < finished; ++i) emulator::finish(all[i]);
  all.erase(all.begin(), all.begin() + finished);
}
static inline void moec_sync_warp() { unsigned nothing = 0; emulator::exchange(&nothing, 1); }
static inline float moec_shuffle(float value, int lane) {
  unsigned word = __float_as_uint(value);
  return __uint_as_float(emulator::exchange(&word, 1)[lane & 31][0]);
}
static inline int moec_shuffle_int(int value, int lane) {
  unsigned word = (unsigned)value;
  return (int)emulator::exchange(&word, 1)[lane & 31][0];
}
// What loops that TVM generates use.
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float x) : bits((uint16_t)emulated_bf16(x)) {}
  operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
static inline unsigned __activemask() { return 0xffffffffu; }
static inline float __shfl_down_sync(unsigned, float value, int delta, int width) {
  int lane = emulator::current->number & 31;
  return moec_shuffle(value, lane % width + delta < width ? lane + delta : lane);
}
static inline float __shfl_sync(unsigned, float value, int lane, int width) {
  return moec_shuffle(value, (emulator::current->number & 31) / width * width + lane);
}
static inline uint64_t moec_shuffle_wide(uint64_t value, int lane) {
  unsigned words[2] = {(unsigned)value, (unsigned)(value >> 32)};
  unsigned *result = emulator::exchange(words, 2)[lane & 31];
  return result[0] | (uint64_t)result[1] << 32;
}
static inline float moec_shuffle_xor(float value, int mask) {
  return moec_shuffle(value, (emulator::current->number ^ mask) & 31);
}
static inline unsigned moec_ballot(bool value) {
  unsigned word = value, result = 0;
  auto *all = emulator::exchange(&word, 1);
  for (int lane = 0; lane < 32; ++lane) result |= all[lane][0] << lane;
  return result;
}
static inline int moec_count_bits(unsigned value) { return __builtin_popcount(value); }
#pragma GCC push_options
#pragma GCC optimize("O2")
static inline void emulated_load_matrix(unsigned *to, const void *row, bool transposed) {
  emulated_aligned(row);
  unsigned words[4];
  std::memcpy(words, row, 16);
  auto *all = emulator::exchange(words, 4);
  int lane = emulator::current->number & 31;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      int r = transposed ? 2 * (lane % 4) + j : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + j;
      pair[j] = (uint16_t)(all[8 * m + r][c / 2] >> (16 * (c % 2)));
    }
    to[m] = pair[0] | (unsigned)pair[1] << 16;
  }
}
#pragma GCC pop_options
static inline void moec_load_matrix(unsigned *to, const void *row) { emulated_load_matrix(to, row, false); }
static inline void moec_load_matrix_transposed(unsigned *to, const void *row) { emulated_load_matrix(to, row, true); }
static inline unsigned moec_transpose(unsigned pair) {
  auto *all = emulator::exchange(&pair, 1);
  int lane = emulator::current->number & 31, shift = lane / 4 % 2 * 16;
  unsigned low = all[lane % 4 * 8 + lane / 8][0], high = all[lane % 4 * 8 + 4 + lane / 8][0];
  return (low >> shift & 0xffffu) | (high >> shift & 0xffffu) << 16;
}
#pragma GCC push_options
#pragma GCC optimize("O2")
static inline void emulated_mma(float *d, const unsigned *words, float (*low)(unsigned), float (*high)(unsigned)) {
  auto *all = emulator::exchange(words, 6);
  int lane = emulator::current->number & 31;
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; ++k) {
      unsigned a = all[4 * (row % 8) + (k % 8) / 2][row / 8 + 2 * (k / 8)];
      unsigned b = all[4 * column + (k % 8) / 2][4 + k / 8];
      sum += (k % 2 ? high(a) : low(a)) * (k % 2 ? high(b) : low(b));
    }
    d[i] = sum;
  }
}
#pragma GCC pop_options
static inline void moec_mma_bf16(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  unsigned words[6] = {a0, a1, a2, a3, b0, b1};
  emulated_mma(d, words, moec_low_bf16, moec_high_bf16);
}
static inline void moec_mma_f16(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  unsigned words[6] = {a0, a1, a2, a3, b0, b1};
  emulated_mma(d, words, moec_low_f16, moec_high_f16);
}
// Products of four warps are done at once here; each thread reads what its results need.
static inline void moec_wgmma_fence() {}
static inline void moec_wgmma_commit() {}
static inline void moec_wgmma_wait(int) {}
static inline void moec_fence_async() {}
static inline void moec_phase_begin(void *phase, int count) {
  *(emulator::Phase *)phase = {(uint16_t)count, (uint16_t)count, 0};
}
static inline void moec_phase_arrive(void *phase) {
  emulator::Phase &own = *(emulator::Phase *)phase;
  if (--own.left == 0) own.left = own.count, ++own.number;
}
static inline void moec_phase_copied(void *phase) {
  emulator::finish(emulator::current->pending);
  emulator::current->pending.clear();
  moec_phase_arrive(phase);
}
static inline void moec_phase_bulk(void *, void *shared, const void *global, int bytes) {
  emulated_aligned(shared), emulated_aligned(global);
  if (bytes % 16) emulator::fail("a copy of a size that is no multiple of 16");
  std::memcpy(shared, global, bytes);
}
static inline void moec_bulk_store(void *global, const void *shared, int bytes) {
  emulated_aligned(shared), emulated_aligned(global);
  if (bytes % 16 || bytes <= 0) emulator::fail("a store of a size that is no multiple of 16");
  emulator::current->stores.push_back({global, shared, (size_t)bytes});
}
static inline void moec_bulk_commit() {}
static inline void moec_bulk_read() {
  for (emulator::Store &one : emulator::current->stores) std::memcpy(one.to, one.from, one.bytes);
  emulator::current->stores.clear();
}
static inline void moec_bulk_arrived() { moec_bulk_read(); }
static inline void moec_phase_wait(void *phase, int parity) {
  emulator::Phase *own = (emulator::Phase *)phase;
  if ((int)(own->number & 1) != parity) return;
  emulator::current->phase = own, emulator::current->parity = parity;
  emulator::yield(emulator::kPhase);
}
static inline void moec_after(float x) {
  if (x < 0) emulator::fail("a number that must not be negative is");
}
static inline void moec_hold_32(float *) {}
static inline void moec_hold_48(float *) {}
static inline void moec_hold_64(float *) {}
static inline void moec_hold_80(float *) {}
static inline void moec_hold_88(float *) {}
static inline void moec_hold_96(float *) {}
static inline void moec_hold_104(float *) {}
static inline void moec_hold_112(float *) {}
static inline void moec_hold_128(float *) {}
static inline uint64_t moec_matrix(const void *shared, int outer) {
  size_t place = (const unsigned char *)shared - emulated_dynamic;
  if (place >= sizeof emulated_dynamic || place % 1024) emulator::fail("a matrix that is not where it must be");
  return place >> 4 | (uint64_t)(outer >> 4) << 16 | 1ull << 62;
}
typedef float (*Widen)(unsigned);
#pragma GCC push_options
#pragma GCC optimize("O2")
static inline float emulated_entry(size_t place, Widen widen) {
  uint16_t bits;
  std::memcpy(&bits, emulated_dynamic + (place ^ (place >> 3 & 0x70)), 2);
  return widen(bits);
}
static inline size_t emulated_place(uint64_t matrix) { return (matrix & 0x3fff) << 4; }
static inline void emulated_wgmma(float *d, int columns, const float (*a)[16], uint64_t b, bool transposed, bool add,
                                  Widen widen) {
  size_t outer = (b >> 16 & 0x3fff) << 4;
  for (int i = 0; i < columns / 2; ++i) {
    int column = i / 4 * 8 + emulator::current->number % 4 * 2 + i % 2;
    float sum = add ? d[i] : 0;
    for (int k = 0; k < 16; ++k) {
      size_t inside = transposed ? column / 64 * outer + column % 64 * 2 + k * 128 : column * 128 + k * 2;
      sum += a[i / 2 % 2][k] * emulated_entry(emulated_place(b) + inside, widen);
    }
    d[i] = sum;
  }
}
static inline void emulated_wgmma_shared(float *d, int columns, uint64_t a, uint64_t b, bool add, Widen widen) {
  float rows[2][16];
  int first = emulator::current->number % 128 / 32 * 16 + emulator::current->number % 32 / 4;
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k)
      rows[half][k] = emulated_entry(emulated_place(a) + (first + 8 * half) * 128 + k * 2, widen);
  emulated_wgmma(d, columns, rows, b, false, add, widen);
}
static inline void emulated_wgmma_rows(float *d, int columns, const unsigned *words, uint64_t b) {
  auto *all = emulator::exchange(words, 4);
  float rows[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) {
      unsigned word = all[(emulator::current->number & 31) / 4 * 4 + k % 8 / 2][half + 2 * (k / 8)];
      rows[half][k] = k % 2 ? moec_high_f16(word) : moec_low_f16(word);
    }
  emulated_wgmma(d, columns, rows, b, true, true, moec_low_f16);
}
#pragma GCC pop_options
#define EMULATED_WGMMA(type, columns)                                                                                  \
  static inline void moec_wgmma_##type##_n##columns(float *d, uint64_t a, uint64_t b, int add) {                       \
    emulated_wgmma_shared(d, columns, a, b, add, moec_low_##type);                                                     \
  }
EMULATED_WGMMA(f16, 64)
EMULATED_WGMMA(bf16, 64)
EMULATED_WGMMA(f16, 96)
EMULATED_WGMMA(bf16, 96)
EMULATED_WGMMA(f16, 128)
EMULATED_WGMMA(bf16, 128)
EMULATED_WGMMA(f16, 160)
EMULATED_WGMMA(bf16, 160)
EMULATED_WGMMA(f16, 176)
EMULATED_WGMMA(bf16, 176)
EMULATED_WGMMA(f16, 192)
EMULATED_WGMMA(bf16, 192)
EMULATED_WGMMA(f16, 208)
EMULATED_WGMMA(bf16, 208)
EMULATED_WGMMA(f16, 224)
EMULATED_WGMMA(bf16, 224)
EMULATED_WGMMA(f16, 256)
EMULATED_WGMMA(bf16, 256)
#define EMULATED_WGMMA_ROWS(columns)                                                                                   \
  static inline void moec_wgmma_f16_rows_n##columns(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3,      \
                                                    uint64_t b) {                                                      \
    unsigned words[4] = {a0, a1, a2, a3};                                                                              \
    emulated_wgmma_rows(d, columns, words, b);                                                                         \
  }
EMULATED_WGMMA_ROWS(64)
EMULATED_WGMMA_ROWS(128)
static inline unsigned moec_low_halves(unsigned a, unsigned b) { return (a & 0xffffu) | b << 16; }
static inline unsigned moec_high_halves(unsigned a, unsigned b) { return a >> 16 | (b & 0xffff0000u); }
static inline int moec_atomic_add(int *place, int value) { return *place += value, *place - value; }
static inline void moec_atomic_add_wide(void *place, uint64_t value) { *(uint64_t *)place += value; }
static inline void moec_signal(long long place, int count) { *(int *)(uintptr_t)place += count; }
static inline void moec_wait_count(long long place, int count) {
  if (*(int *)(uintptr_t)place < count) emulator::fail("a wait for what never comes");
}
static inline bool moec_arrives_last(int counter, int count) {
  static int counters[4096];
  bool last = ++counters[counter] == count;
  if (last) counters[counter] = 0;
  return last;
}
static inline long long moec_acquire_system(const void *word) {
  if ((uintptr_t)word % 8) emulator::fail("an 8-byte access at an address that is no multiple of 8");
  sched_yield();  // the CPU that is waited for may want this core
  return __atomic_load_n((const long long *)word, __ATOMIC_ACQUIRE);
}
static inline void moec_release_system(void *word, long long value) {
  if ((uintptr_t)word % 8) emulator::fail("an 8-byte access at an address that is no multiple of 8");
  __atomic_store_n((long long *)word, value, __ATOMIC_RELEASE);
}
static inline void moec_load_system_16(unsigned *to, const void *from) { moec_load_16(to, from); }
static inline long long moec_nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ll + now.tv_nsec;
}
