// The primitives of compiler/kernels/cuda/primitives.cuh. What a GPU would forgive is an error here: an address that is
// no multiple of what is read there, shared memory read before its copy was waited for (it is copied only then).
#include "fibers.h"

#include <sched.h>
#include <time.h>
#include <utility>

using namespace emulator;

namespace {
unsigned bf16(float x) {
  unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}
unsigned f16(float x) {
  _Float16 y = (_Float16)x;
  uint16_t bits;
  memcpy(&bits, &y, 2);
  return bits;
}
float f16_to_f32(unsigned bits) {
  uint16_t word = (uint16_t)bits;
  _Float16 y;
  memcpy(&y, &word, 2);
  return (float)y;
}
template <typename Each> unsigned halves(unsigned a, unsigned b, unsigned c, Each each) {
  float low = each(moec_low_f16(a), moec_low_f16(b), moec_low_f16(c));
  return moec_pack_f16(low, each(moec_high_f16(a), moec_high_f16(b), moec_high_f16(c)));
}
void aligned(const void *place) {
  if ((uintptr_t)place % 16) fail("a 16-byte access at an address that is no multiple of 16");
}
void aligned_8(const void *place) {
  if ((uintptr_t)place % 8) fail("an 8-byte access at an address that is no multiple of 8");
}
void finish(const Copy &copy) {
  if (copy.valid) memcpy(copy.to, copy.from, 16);
  else memset(copy.to, 0, 16);
}
}  // namespace

void __syncthreads() { wait_for_block(); }

unsigned moec_pack_bf16(float low, float high) { return bf16(low) | bf16(high) << 16; }
unsigned moec_pack_f16(float low, float high) { return f16(low) | f16(high) << 16; }
float moec_low_f16(unsigned pair) { return f16_to_f32(pair & 0xffffu); }
float moec_high_f16(unsigned pair) { return f16_to_f32(pair >> 16); }
unsigned moec_sub_f16x2(unsigned a, unsigned b) {
  return halves(a, b, 0, [](float x, float y, float) { return x - y; });
}
unsigned moec_mul_f16x2(unsigned a, unsigned b) {
  return halves(a, b, 0, [](float x, float y, float) { return x * y; });
}
unsigned moec_fma_f16x2(unsigned a, unsigned b, unsigned c) {
  return halves(a, b, c, [](float x, float y, float z) { return fmaf(x, y, z); });
}

void moec_load_16(unsigned *to, const void *from) { aligned(from), memcpy(to, from, 16); }
void moec_load_stream(unsigned *to, const void *from) { moec_load_16(to, from); }
void moec_load_system_16(unsigned *to, const void *from) { moec_load_16(to, from); }
void moec_load_16_if(unsigned *to, const void *from, bool valid) {
  if (valid) moec_load_16(to, from);
  else memset(to, 0, 16);
}
void moec_stream_16(unsigned *to, long long address) { moec_load_16(to, (const void *)(uintptr_t)address); }
void moec_stream_16_if(unsigned *to, long long address, bool valid) {
  moec_load_16_if(to, (const void *)(uintptr_t)address, valid);
}
template <typename Word> static unsigned fetch(long long address, bool valid) {
  if (!valid) return 0;
  if (address % sizeof(Word)) fail("an access at an address that is no multiple of its size");
  return *(const Word *)(uintptr_t)address;
}
unsigned moec_fetch_1_if(long long address, bool valid) { return fetch<uint8_t>(address, valid); }
unsigned moec_fetch_2_if(long long address, bool valid) { return fetch<uint16_t>(address, valid); }
unsigned moec_fetch_4_if(long long address, bool valid) { return fetch<uint32_t>(address, valid); }
void moec_store_16(void *to, unsigned a, unsigned b, unsigned c, unsigned d) {
  unsigned words[4] = {a, b, c, d};
  aligned(to), memcpy(to, words, 16);
}
void moec_store_8(void *to, unsigned a, unsigned b) {
  unsigned words[2] = {a, b};
  aligned_8(to), memcpy(to, words, 8);
}
void moec_store_4(void *to, unsigned value) {
  if ((uintptr_t)to % 4) fail("a 4-byte access at an address that is no multiple of 4");
  memcpy(to, &value, 4);
}
void moec_store_pair(void *to, float a, float b) {
  float pair[2] = {a, b};
  aligned_8(to), memcpy(to, pair, 8);
}

void moec_copy_async_16_if(void *shared, const void *global, bool valid) {
  aligned(shared), aligned(global);
  memset(shared, 0xff, 16);  // not there before it is waited for
  begun().pending.push_back({shared, global, valid});
}
void moec_copy_async_16(void *shared, const void *global) { moec_copy_async_16_if(shared, global, true); }
void moec_copy_stream_16(void *shared, long long address) {
  moec_copy_async_16(shared, (const void *)(uintptr_t)address);
}
void moec_copy_stream_16_if(void *shared, long long address, bool valid) {
  moec_copy_async_16_if(shared, (const void *)(uintptr_t)address, valid);
}
void moec_copy_commit() {
  Begun &own = begun();
  own.committed.insert(own.committed.end(), own.pending.begin(), own.pending.end());
  own.pending.clear();
  own.groups.push_back(own.committed.size());
}
void moec_copy_wait(int groups) {
  Begun &own = begun();
  if (own.groups.size() <= (size_t)groups) return;
  size_t finished = own.groups.size() - groups, copies = own.groups[finished - 1];
  for (size_t i = 0; i < copies; ++i) finish(own.committed[i]);
  own.committed.erase(own.committed.begin(), own.committed.begin() + copies);
  own.groups.erase(own.groups.begin(), own.groups.begin() + finished);
  for (size_t &end : own.groups) end -= copies;
}
void moec_bulk_store(void *global, const void *shared, int bytes) {
  aligned(shared), aligned(global);
  if (bytes % 16 || bytes <= 0) fail("a store of a size that is no multiple of 16");
  begun().stores.push_back({global, shared, (size_t)bytes});
}
void moec_bulk_read() {
  for (Store &one : begun().stores) memcpy(one.to, one.from, one.bytes);
  begun().stores.clear();
}
void moec_bulk_arrived() { moec_bulk_read(); }

void moec_sync_warp() { wait_for_warp(); }
float moec_shuffle(float value, int from) {
  unsigned word = __float_as_uint(value);
  return __uint_as_float(exchange({word})[from & 31][0]);
}
int moec_shuffle_int(int value, int from) {
  unsigned word = (unsigned)value;
  return (int)exchange({word})[from & 31][0];
}
uint64_t moec_shuffle_wide(uint64_t value, int from) {
  unsigned words[2] = {(unsigned)value, (unsigned)(value >> 32)};
  unsigned *result = exchange(words)[from & 31];
  return result[0] | (uint64_t)result[1] << 32;
}
float moec_shuffle_xor(float value, int mask) { return moec_shuffle(value, lane() ^ mask); }
float __shfl_down_sync(unsigned, float value, int delta, int width) {
  return moec_shuffle(value, lane() % width + delta < width ? lane() + delta : lane());
}
float __shfl_sync(unsigned, float value, int from, int width) {
  return moec_shuffle(value, lane() / width * width + from);
}
unsigned moec_ballot(bool value) {
  unsigned word = value, result = 0;
  auto *all = exchange({word});
  for (int i = 0; i < kLanes; ++i) result |= all[i][0] << i;
  return result;
}
unsigned moec_transpose(unsigned pair) {
  auto *all = exchange({pair});
  int shift = lane() / 4 % 2 * 16;
  unsigned low = all[lane() % 4 * 8 + lane() / 8][0], high = all[lane() % 4 * 8 + 4 + lane() / 8][0];
  return (low >> shift & 0xffffu) | (high >> shift & 0xffffu) << 16;
}
static void load_matrix(unsigned *to, const void *row, bool transposed) {
  aligned(row);
  unsigned words[4];
  memcpy(words, row, 16);
  auto *all = exchange(words);
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      int r = transposed ? 2 * (lane() % 4) + j : lane() / 4, c = transposed ? lane() / 4 : 2 * (lane() % 4) + j;
      pair[j] = (uint16_t)(all[8 * m + r][c / 2] >> (16 * (c % 2)));
    }
    to[m] = pair[0] | (unsigned)pair[1] << 16;
  }
}
void moec_load_matrix(unsigned *to, const void *row) { load_matrix(to, row, false); }
void moec_load_matrix_transposed(unsigned *to, const void *row) { load_matrix(to, row, true); }

// Each of these has the two conversions of a pair.
struct F16 {
  static float low(unsigned pair) { return moec_low_f16(pair); }
  static float high(unsigned pair) { return moec_high_f16(pair); }
};
struct BF16 {
  static float low(unsigned pair) { return moec_low_bf16(pair); }
  static float high(unsigned pair) { return moec_high_bf16(pair); }
};
template <typename Half> static void mma(float *d, const unsigned (&words)[6]) {
  auto *all = exchange(words);
  for (int i = 0; i < 4; ++i) {
    int row = lane() / 4 + 8 * (i / 2), column = 2 * (lane() % 4) + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; ++k) {
      unsigned a = all[4 * (row % 8) + (k % 8) / 2][row / 8 + 2 * (k / 8)];
      unsigned b = all[4 * column + (k % 8) / 2][4 + k / 8];
      sum += (k % 2 ? Half::high(a) : Half::low(a)) * (k % 2 ? Half::high(b) : Half::low(b));
    }
    d[i] = sum;
  }
}
void moec_mma_bf16(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  mma<BF16>(d, {a0, a1, a2, a3, b0, b1});
}
void moec_mma_f16(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  mma<F16>(d, {a0, a1, a2, a3, b0, b1});
}

void moec_phase_begin(void *phase, int count) { *(Phase *)phase = {(uint16_t)count, (uint16_t)count, 0}; }
void moec_phase_arrive(void *phase) {
  Phase &own = *(Phase *)phase;
  if (--own.left == 0) own.left = own.count, ++own.number;
}
void moec_phase_copied(void *phase) {
  for (const Copy &copy : begun().pending) finish(copy);
  begun().pending.clear();
  moec_phase_arrive(phase);
}
void moec_phase_bulk(void *, void *shared, const void *global, int bytes) {
  aligned(shared), aligned(global);
  if (bytes % 16) fail("a copy of a size that is no multiple of 16");
  memcpy(shared, global, bytes);
}
void moec_phase_wait(void *phase, int parity) { wait_for_phase((Phase *)phase, parity); }

uint64_t moec_matrix(const void *shared, int outer) {
  size_t place = (const unsigned char *)shared - emulated_dynamic;
  if (place >= kDynamicBytes || place % 1024) fail("a matrix that is not where it must be");
  return place >> 4 | (uint64_t)(outer >> 4) << 16 | 1ull << 62;
}
static size_t place_of(uint64_t matrix) { return (matrix & 0x3fff) << 4; }
template <typename Half> static float entry(size_t place) {
  uint16_t bits;
  memcpy(&bits, emulated_dynamic + (place ^ (place >> 3 & 0x70)), 2);
  return Half::low(bits);
}
// Each thread reads what its results need.
template <typename Half>
static void wgmma(float *d, int columns, const float (*a)[16], uint64_t b, bool transposed, bool add) {
  size_t outer = (b >> 16 & 0x3fff) << 4;
  for (int i = 0; i < columns / 2; ++i) {
    int column = i / 4 * 8 + lane() % 4 * 2 + i % 2;
    float sum = add ? d[i] : 0;
    for (int k = 0; k < 16; ++k) {
      size_t inside = transposed ? column / 64 * outer + column % 64 * 2 + k * 128 : column * 128 + k * 2;
      sum += a[i / 2 % 2][k] * entry<Half>(place_of(b) + inside);
    }
    d[i] = sum;
  }
}
template <typename Half> static void wgmma_shared(float *d, int columns, uint64_t a, uint64_t b, bool add) {
  float rows[2][16];
  int first = threadIdx.x % 128 / kLanes * 16 + lane() / 4;
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) rows[half][k] = entry<Half>(place_of(a) + (first + 8 * half) * 128 + k * 2);
  wgmma<Half>(d, columns, rows, b, false, add);
}
static void wgmma_rows(float *d, int columns, const unsigned (&words)[4], uint64_t b) {
  auto *all = exchange(words);
  float rows[2][16];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) {
      unsigned word = all[lane() / 4 * 4 + k % 8 / 2][half + 2 * (k / 8)];
      rows[half][k] = k % 2 ? moec_high_f16(word) : moec_low_f16(word);
    }
  wgmma<F16>(d, columns, rows, b, true, true);
}
#define EMULATE_BOTH(columns)                                                      \
  EMULATED_WGMMA(f16, columns) { wgmma_shared<F16>(d, columns, a, b, add); }       \
  EMULATED_WGMMA(bf16, columns) { wgmma_shared<BF16>(d, columns, a, b, add); }
EMULATE_BOTH(64)
EMULATE_BOTH(96)
EMULATE_BOTH(128)
EMULATE_BOTH(160)
EMULATE_BOTH(176)
EMULATE_BOTH(192)
EMULATE_BOTH(208)
EMULATE_BOTH(224)
EMULATE_BOTH(256)
EMULATED_WGMMA_ROWS(64) { wgmma_rows(d, 64, {a0, a1, a2, a3}, b); }
EMULATED_WGMMA_ROWS(128) { wgmma_rows(d, 128, {a0, a1, a2, a3}, b); }

void moec_after(float x) {
  if (x < 0) fail("a number that must not be negative is");
}
void moec_wait_count(long long place, int count) {
  if (*(int *)(uintptr_t)place < count) fail("a wait for what never comes");
}
bool moec_arrives_last(int counter, int count) {
  static int counters[4096];
  bool last = ++counters[counter] == count;
  if (last) counters[counter] = 0;
  return last;
}
long long moec_acquire_system(const void *word) {
  aligned_8(word);
  sched_yield();  // the CPU that is waited for may want this core
  return __atomic_load_n((const long long *)word, __ATOMIC_ACQUIRE);
}
void moec_release_system(void *word, long long value) {
  aligned_8(word);
  __atomic_store_n((long long *)word, value, __ATOMIC_RELEASE);
}
long long moec_nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ll + now.tv_nsec;
}
