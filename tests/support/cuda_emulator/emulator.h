// What kernels may call and are compiled beside: types of CUDA, and the primitives of
// compiler/kernels/cuda/primitives.cuh. Most are declared alone: fibers.cpp and primitives.cpp, which have them, are
// compiled once for all kernels.
#pragma once
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS  // C's own: those of C++ take longer to read than most kernels
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __forceinline__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static
#define __CUDA_ARCH_FEAT_SM90_ALL
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN

#pragma GCC visibility push(hidden)  // every library of kernels has a state of its own

struct Dim3 { int x, y, z; };
extern Dim3 blockIdx, threadIdx, blockDim, gridDim;
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
static inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

constexpr int kDynamicBytes = 232448;
extern unsigned char emulated_dynamic[kDynamicBytes];  // shared memory that is given at launch

extern "C" void moec_emulate(void (*body)(void *), void *arguments, const int64_t *grid, int threads);
void __syncthreads();

// Conversions between float32 and packed pairs of 16-bit floats.
unsigned moec_pack_bf16(float low, float high);
unsigned moec_pack_f16(float low, float high);
float moec_low_f16(unsigned pair);
float moec_high_f16(unsigned pair);
static inline float moec_low_bf16(unsigned pair) { return __uint_as_float(pair << 16); }
static inline float moec_high_bf16(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
unsigned moec_sub_f16x2(unsigned a, unsigned b);
unsigned moec_mul_f16x2(unsigned a, unsigned b);
unsigned moec_fma_f16x2(unsigned a, unsigned b, unsigned c);
static inline unsigned moec_low_halves(unsigned a, unsigned b) { return (a & 0xffffu) | b << 16; }
static inline unsigned moec_high_halves(unsigned a, unsigned b) { return a >> 16 | (b & 0xffff0000u); }
struct nv_bfloat16 {  // what loops that TVM generates use
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float x) : bits((uint16_t)moec_pack_bf16(x, 0)) {}
  operator float() const { return __uint_as_float((unsigned)bits << 16); }
};

// Arithmetic.
static inline unsigned moec_held(unsigned constant) { return constant; }
static inline float moec_clamp(float x, float largest) { return x > largest ? largest : x < -largest ? -largest : x; }
static inline float moec_exp2(float x) { return exp2f(x); }
static inline float moec_exp(float x) { return expf(x); }
static inline float moec_reciprocal(float x) { return 1 / x; }
static inline float moec_times(float x, float y) { return x * y; }
static inline int moec_count_bits(unsigned value) { return __builtin_popcount(value); }

// Memory.
static inline long long moec_address(const void *place) { return (long long)(uintptr_t)place; }
void moec_load_16(unsigned *to, const void *from);
void moec_load_16_if(unsigned *to, const void *from, bool valid);
void moec_load_stream(unsigned *to, const void *from);
void moec_stream_16(unsigned *to, long long address);
void moec_stream_16_if(unsigned *to, long long address, bool valid);
unsigned moec_fetch_1_if(long long address, bool valid);
unsigned moec_fetch_2_if(long long address, bool valid);
unsigned moec_fetch_4_if(long long address, bool valid);
void moec_store_16(void *to, unsigned a, unsigned b, unsigned c, unsigned d);
void moec_store_8(void *to, unsigned a, unsigned b);
void moec_store_4(void *to, unsigned value);
void moec_store_pair(void *to, float a, float b);
static inline void moec_prefetch_l2(const void *) {}

// Copies that are waited for.
void moec_copy_async_16(void *shared, const void *global);
void moec_copy_async_16_if(void *shared, const void *global, bool valid);
void moec_copy_stream_16(void *shared, long long address);
void moec_copy_stream_16_if(void *shared, long long address, bool valid);
void moec_copy_commit();
void moec_copy_wait(int groups);
void moec_bulk_store(void *global, const void *shared, int bytes);
static inline void moec_bulk_commit() {}
void moec_bulk_read();
void moec_bulk_arrived();

// Among the lanes of a warp.
void moec_sync_warp();
float moec_shuffle(float value, int lane);
int moec_shuffle_int(int value, int lane);
uint64_t moec_shuffle_wide(uint64_t value, int lane);
float moec_shuffle_xor(float value, int mask);
unsigned moec_ballot(bool value);
unsigned moec_transpose(unsigned pair);
void moec_load_matrix(unsigned *to, const void *row);
void moec_load_matrix_transposed(unsigned *to, const void *row);
void moec_mma_bf16(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1);
void moec_mma_f16(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1);
static inline unsigned __activemask() { return 0xffffffffu; }
float __shfl_down_sync(unsigned, float value, int delta, int width);
float __shfl_sync(unsigned, float value, int lane, int width);

// Barriers in shared memory, and products of four warps, which are done at once here.
void moec_phase_begin(void *phase, int count);
void moec_phase_arrive(void *phase);
void moec_phase_copied(void *phase);
void moec_phase_bulk(void *phase, void *shared, const void *global, int bytes);
void moec_phase_wait(void *phase, int parity);
static inline void moec_fence_async() {}
static inline void moec_wgmma_fence() {}
static inline void moec_wgmma_commit() {}
static inline void moec_wgmma_wait(int) {}
uint64_t moec_matrix(const void *shared, int outer);
#define EMULATED_WGMMA(type, columns)                                                                                  \
  void moec_wgmma_##type##_n##columns(float *d, uint64_t a, uint64_t b, int add)
#define EMULATED_WGMMA_ROWS(columns)                                                                                   \
  void moec_wgmma_f16_rows_n##columns(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, uint64_t b)
EMULATED_WGMMA(f16, 64);
EMULATED_WGMMA(bf16, 64);
EMULATED_WGMMA(f16, 96);
EMULATED_WGMMA(bf16, 96);
EMULATED_WGMMA(f16, 128);
EMULATED_WGMMA(bf16, 128);
EMULATED_WGMMA(f16, 160);
EMULATED_WGMMA(bf16, 160);
EMULATED_WGMMA(f16, 176);
EMULATED_WGMMA(bf16, 176);
EMULATED_WGMMA(f16, 192);
EMULATED_WGMMA(bf16, 192);
EMULATED_WGMMA(f16, 208);
EMULATED_WGMMA(bf16, 208);
EMULATED_WGMMA(f16, 224);
EMULATED_WGMMA(bf16, 224);
EMULATED_WGMMA(f16, 256);
EMULATED_WGMMA(bf16, 256);
EMULATED_WGMMA_ROWS(64);
EMULATED_WGMMA_ROWS(128);

// What is said to the compiler or to the GPU, and means nothing here.
static inline void moec_blocks_at_once(int) {}
static inline void moec_wait_previous() {}
static inline void moec_launch_next() {}
static inline void moec_hold_words(unsigned *) {}
static inline void moec_hold_32(float *) {}
static inline void moec_hold_48(float *) {}
static inline void moec_hold_64(float *) {}
static inline void moec_hold_80(float *) {}
static inline void moec_hold_88(float *) {}
static inline void moec_hold_96(float *) {}
static inline void moec_hold_104(float *) {}
static inline void moec_hold_112(float *) {}
static inline void moec_hold_128(float *) {}
void moec_after(float x);

// Among blocks, and with the CPU.
static inline int moec_atomic_add(int *place, int value) { return *place += value, *place - value; }
static inline void moec_atomic_add_wide(void *place, uint64_t value) { *(uint64_t *)place += value; }
static inline void moec_signal(long long place, int count) { *(int *)(uintptr_t)place += count; }
void moec_wait_count(long long place, int count);
bool moec_arrives_last(int counter, int count);
long long moec_acquire_system(const void *word);
void moec_release_system(void *word, long long value);
void moec_load_system_16(unsigned *to, const void *from);
long long moec_nanoseconds();
#pragma GCC visibility pop
