// What CUDA has and TIRx's core language has not: the device functions that kernels call through primitives.py.
// tests/support/cuda_emulator/emulator.h has the same functions in plain C++, one for one.
#define MOEC_DEVICE static __device__ __forceinline__

// Says how many blocks a multiprocessor should hold at once: cuda_module.py reads it.
MOEC_DEVICE void moec_blocks_at_once(int) {}
MOEC_DEVICE void moec_wait_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
MOEC_DEVICE void moec_launch_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Conversions between float32 and packed pairs of 16-bit floats; the low half is the first of the pair.
MOEC_DEVICE unsigned moec_pack_bf16(float low, float high) {
  unsigned result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
MOEC_DEVICE unsigned moec_pack_f16(float low, float high) {
  unsigned result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
MOEC_DEVICE float moec_low_bf16(unsigned pair) { return __uint_as_float(pair << 16); }
MOEC_DEVICE float moec_high_bf16(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
MOEC_DEVICE float moec_low_f16(unsigned pair) {
  float result;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(result) : "r"(pair));
  return result;
}
MOEC_DEVICE float moec_high_f16(unsigned pair) {
  float result;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(result) : "r"(pair));
  return result;
}

// Arithmetic on pairs of float16, rounded to nearest even.
MOEC_DEVICE unsigned moec_sub_f16x2(unsigned a, unsigned b) {
  unsigned result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
MOEC_DEVICE unsigned moec_mul_f16x2(unsigned a, unsigned b) {
  unsigned result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
MOEC_DEVICE unsigned moec_fma_f16x2(unsigned a, unsigned b, unsigned c) {
  unsigned result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
// Keep the compiler from computing ahead, once for all, what follows from four words.
MOEC_DEVICE void moec_hold_words(unsigned *d) { asm volatile("" : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])); }

// A constant in a register: through memory, or the compiler would make it anew wherever it is used.
MOEC_DEVICE unsigned moec_held(unsigned constant) {
  volatile unsigned held = constant;
  return held;
}

// x within -largest .. largest; what is not a number stays so.
MOEC_DEVICE float moec_clamp(float x, float largest) {
  float result;
  asm("{.reg .f32 t; min.NaN.f32 t, %1, %2; max.NaN.f32 %0, t, %3;}" : "=f"(result) : "f"(x), "f"(largest), "f"(-largest));
  return result;
}

// 2^x, to about 2 ulp; 0 for -infinity.
MOEC_DEVICE float moec_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// 1 / x to 1 ulp; 0 for infinity.
MOEC_DEVICE float moec_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
MOEC_DEVICE float moec_exp(float x) { return expf(x); }  // to 1 ulp
MOEC_DEVICE float moec_times(float x, float y) { return __fmul_rn(x, y); }  // rounded, whatever it is added to

// Memory. Addresses of 16-byte accesses are multiples of 16.
MOEC_DEVICE void moec_load_stream(unsigned *to, const void *from) {  // 16 bytes that are read once
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}
MOEC_DEVICE long long moec_address(const void *place) { return reinterpret_cast<long long>(place); }
MOEC_DEVICE void moec_stream_16(unsigned *to, long long address) {
  moec_load_stream(to, reinterpret_cast<const void *>(address));
}
MOEC_DEVICE void moec_stream_16_if(unsigned *to, long long address, bool valid) {  // zeros where not valid
  to[0] = to[1] = to[2] = to[3] = 0;
  asm volatile(
      "{.reg .pred p; setp.ne.s32 p, %5, 0;\n"
      " @p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3]) : "l"(address), "r"((int)valid));
}
// One, two or four bytes in a word; zero where not valid.
#define MOEC_FETCH(bytes, type)                                                                                        \
  MOEC_DEVICE unsigned moec_fetch_##bytes##_if(long long address, bool valid) {                                        \
    return valid ? __ldg(reinterpret_cast<const type *>(address)) : 0;                                                 \
  }
MOEC_FETCH(1, unsigned char)
MOEC_FETCH(2, unsigned short)
MOEC_FETCH(4, unsigned)
MOEC_DEVICE void moec_prefetch_l2(const void *place) { asm volatile("prefetch.global.L2 [%0];" ::"l"(place)); }
MOEC_DEVICE void moec_load_16(unsigned *to, const void *from) {
  uint4 value = *reinterpret_cast<const uint4 *>(from);
  to[0] = value.x, to[1] = value.y, to[2] = value.z, to[3] = value.w;
}
MOEC_DEVICE void moec_load_16_if(unsigned *to, const void *from, bool valid) {  // zeros where not valid
  uint4 value = make_uint4(0, 0, 0, 0);
  if (valid) value = *reinterpret_cast<const uint4 *>(from);
  to[0] = value.x, to[1] = value.y, to[2] = value.z, to[3] = value.w;
}
MOEC_DEVICE void moec_store_16(void *to, unsigned a, unsigned b, unsigned c, unsigned d) {
  *reinterpret_cast<uint4 *>(to) = make_uint4(a, b, c, d);
}
MOEC_DEVICE void moec_store_8(void *to, unsigned a, unsigned b) { *reinterpret_cast<uint2 *>(to) = make_uint2(a, b); }
MOEC_DEVICE void moec_store_4(void *to, unsigned value) { *reinterpret_cast<unsigned *>(to) = value; }
MOEC_DEVICE void moec_store_pair(void *to, float a, float b) {  // at a multiple of 8
  *reinterpret_cast<float2 *>(to) = make_float2(a, b);
}
MOEC_DEVICE void moec_copy_async_16(void *shared, const void *global) {
  unsigned place = (unsigned)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(place), "l"(global) : "memory");
}
MOEC_DEVICE void moec_copy_async_16_if(void *shared, const void *global, bool valid) {  // zeros where not valid
  unsigned place = (unsigned)__cvta_generic_to_shared(shared);
  int size = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(place), "l"(global), "r"(size)
               : "memory");
}
MOEC_DEVICE void moec_copy_stream_16(void *shared, long long address) {
  moec_copy_async_16(shared, reinterpret_cast<const void *>(address));
}
MOEC_DEVICE void moec_copy_stream_16_if(void *shared, long long address, bool valid) {  // zeros where not valid
  moec_copy_async_16_if(shared, reinterpret_cast<const void *>(address), valid);
}
MOEC_DEVICE void moec_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
MOEC_DEVICE void moec_copy_wait(int groups) {  // until at most so many committed groups (0 to 7) are under way
  if (groups == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  else if (groups == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  else if (groups == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  else if (groups == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
  else if (groups == 4) asm volatile("cp.async.wait_group 4;" ::: "memory");
  else if (groups == 5) asm volatile("cp.async.wait_group 5;" ::: "memory");
  else if (groups == 6) asm volatile("cp.async.wait_group 6;" ::: "memory");
  else asm volatile("cp.async.wait_group 7;" ::: "memory");
}

// Warp-wide operations: all 32 lanes take part.
MOEC_DEVICE void moec_sync_warp() { __syncwarp(); }
MOEC_DEVICE float moec_shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
MOEC_DEVICE float moec_shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
MOEC_DEVICE int moec_shuffle_int(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
MOEC_DEVICE unsigned long long moec_shuffle_wide(unsigned long long value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
MOEC_DEVICE unsigned moec_ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
MOEC_DEVICE int moec_count_bits(unsigned value) { return __popc(value); }

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
MOEC_DEVICE void moec_load_matrix(unsigned *to, const void *row) {
  unsigned place = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(place));
}
MOEC_DEVICE void moec_load_matrix_transposed(unsigned *to, const void *row) {
  unsigned place = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(place));
}

// Eight rows of eight 16-bit elements, of which lane i has elements 2 (i % 4) and the next of row i / 4, the other way.
MOEC_DEVICE unsigned moec_transpose(unsigned pair) {
  unsigned result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// d[16x8] += a[16x16] b[16x8]; fragments as PTX's mma.m16n8k16 has them.
MOEC_DEVICE void moec_mma_bf16(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
MOEC_DEVICE void moec_mma_f16(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The low, or the high, halves of two words in one.
MOEC_DEVICE unsigned moec_low_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }
MOEC_DEVICE unsigned moec_high_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }

// Counters in shared or global memory; sums of integers do not depend on the order. The first returns what was there.
MOEC_DEVICE int moec_atomic_add(int *place, int value) { return atomicAdd(place, value); }
MOEC_DEVICE void moec_atomic_add_wide(void *place, unsigned long long value) {
  atomicAdd(reinterpret_cast<unsigned long long *>(place), value);
}

// Counts of what one kernel has written and another one that runs beside it reads. For one thread of a block, after a
// barrier; and before one.
MOEC_DEVICE void moec_signal(long long place, int count) {
  __threadfence();
  atomicAdd(reinterpret_cast<int *>(place), count);
}
MOEC_DEVICE void moec_wait_count(long long place, int count) {
  int seen;
  for (;;) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(place) : "memory");
    if (seen >= count) break;
    __nanosleep(100);
  }
}

// Counters of blocks that share work: zero when a module is loaded, and again whenever all have arrived.
static __device__ unsigned moec_counters[4096];
// For one thread of a block, after a barrier: whether `count` blocks have now arrived at a counter. What the others
// wrote before that can be read then.
MOEC_DEVICE bool moec_arrives_last(int counter, int count) {
  __threadfence();
  unsigned before = atomicInc(&moec_counters[counter], (unsigned)count - 1);
  __threadfence();
  return before == (unsigned)count - 1;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Hopper's products of four warps. They run behind the threads' backs: `wgmma_fence` goes before the first of a group
// when registers or shared memory were written, `wgmma_commit` after the last, `wgmma_wait` before results are read, and
// `hold` keeps the compiler from moving what touches the results across that.
MOEC_DEVICE void moec_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MOEC_DEVICE void moec_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
MOEC_DEVICE void moec_wgmma_wait(int groups) {  // until at most so many committed groups (0 or 1) are under way
  if (groups == 0) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  else asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}
// What follows is not moved ahead of what x, which is never negative, is computed from: a branch is in between.
MOEC_DEVICE void moec_after(float x) {
  while (x < 0) __nanosleep(100);
}
// What this thread has written to shared memory can be read by what runs behind its back, after a barrier.
MOEC_DEVICE void moec_fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Barriers in shared memory of eight bytes that are passed phase by phase: a phase ends when as many have arrived as it
// was begun with. A thread can leave its arrival to the copies that it has started.
MOEC_DEVICE void moec_phase_begin(void *phase, int count) {
  unsigned place = (unsigned)__cvta_generic_to_shared(phase);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(place), "r"(count) : "memory");
}
MOEC_DEVICE void moec_phase_arrive(void *phase) {
  unsigned place = (unsigned)__cvta_generic_to_shared(phase);
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(place) : "memory");
}
MOEC_DEVICE void moec_phase_copied(void *phase) {
  unsigned place = (unsigned)__cvta_generic_to_shared(phase);
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(place) : "memory");
}
// Copies that many bytes (a multiple of 16) in one go, for a thread that has yet to arrive: the phase does not end before
// they are there.
MOEC_DEVICE void moec_phase_bulk(void *phase, void *shared, const void *global, int bytes) {
  unsigned place = (unsigned)__cvta_generic_to_shared(phase), to = (unsigned)__cvta_generic_to_shared(shared);
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(place), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(global), "r"(bytes), "r"(place)
               : "memory");
}
// Copies the other way, from what was written before a fence and a barrier; both at multiples of 16 bytes. A thread's
// copies up to a commit are one group.
MOEC_DEVICE void moec_bulk_store(void *global, const void *shared, int bytes) {
  unsigned from = (unsigned)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(from), "r"(bytes)
               : "memory");
}
MOEC_DEVICE void moec_bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
MOEC_DEVICE void moec_bulk_read() {  // until shared memory has been read by all of the thread's groups
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
MOEC_DEVICE void moec_bulk_arrived() {  // and what they copy is there
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
MOEC_DEVICE void moec_phase_wait(void *phase, int parity) {  // until the phase of that parity is over
  unsigned place = (unsigned)__cvta_generic_to_shared(phase), over;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(over) : "r"(place), "r"(parity) : "memory");
  } while (!over);
}
#define MOEC_HOLD(count)                                                                                               \
  MOEC_DEVICE void moec_hold_##count(float *d) {                                                                       \
    _Pragma("unroll") for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");                         \
  }
MOEC_HOLD(32)
MOEC_HOLD(48)
MOEC_HOLD(64)
MOEC_HOLD(80)
MOEC_HOLD(88)
MOEC_HOLD(96)
MOEC_HOLD(104)
MOEC_HOLD(112)
MOEC_HOLD(128)
// A matrix of 16-bit elements in dynamic shared memory, in rows of 128 bytes whose 16-byte pieces are permuted: piece p of
// row r lies at p ^ (r % 8). It begins at a multiple of 1024 bytes; `outer` bytes on are the next 64 columns. A step of
// 16 elements along a row is 2, one of 16 rows 128, in the descriptor's units of 16 bytes.
MOEC_DEVICE unsigned long long moec_matrix(const void *shared, int outer) {
  unsigned place = (unsigned)__cvta_generic_to_shared(shared);
  return (unsigned long long)((place & 0x3ffffu) >> 4) | (unsigned long long)(outer >> 4) << 16 |
         (unsigned long long)(1024 >> 4) << 32 | 1ull << 62;
}
// The operands of products of four warps: sums, and their names in the instruction.
#define MOEC_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOEC_SUMS_8(i) MOEC_SUMS_4(i), MOEC_SUMS_4(i + 4)
#define MOEC_SUMS_32 MOEC_SUMS_8(0), MOEC_SUMS_8(8), MOEC_SUMS_8(16), MOEC_SUMS_8(24)
#define MOEC_SUMS_40 MOEC_SUMS_32, MOEC_SUMS_8(32)
#define MOEC_SUMS_48 MOEC_SUMS_40, MOEC_SUMS_8(40)
#define MOEC_SUMS_56 MOEC_SUMS_48, MOEC_SUMS_8(48)
#define MOEC_SUMS_64 MOEC_SUMS_56, MOEC_SUMS_8(56)
#define MOEC_SUMS_72 MOEC_SUMS_64, MOEC_SUMS_8(64)
#define MOEC_SUMS_80 MOEC_SUMS_72, MOEC_SUMS_8(72)
#define MOEC_SUMS_88 MOEC_SUMS_80, MOEC_SUMS_8(80)
#define MOEC_SUMS_96 MOEC_SUMS_88, MOEC_SUMS_8(88)
#define MOEC_SUMS_104 MOEC_SUMS_96, MOEC_SUMS_8(96)
#define MOEC_SUMS_112 MOEC_SUMS_104, MOEC_SUMS_8(104)
#define MOEC_SUMS_120 MOEC_SUMS_112, MOEC_SUMS_8(112)
#define MOEC_SUMS_128 MOEC_SUMS_120, MOEC_SUMS_8(120)
#define MOEC_NAMES_32                                                                                                  \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"                 \
  "%27,%28,%29,%30,%31"
#define MOEC_NAMES_40 MOEC_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define MOEC_NAMES_48 MOEC_NAMES_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define MOEC_NAMES_56 MOEC_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define MOEC_NAMES_64 MOEC_NAMES_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define MOEC_NAMES_72 MOEC_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define MOEC_NAMES_80 MOEC_NAMES_72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define MOEC_NAMES_88 MOEC_NAMES_80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define MOEC_NAMES_96 MOEC_NAMES_88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define MOEC_NAMES_104 MOEC_NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define MOEC_NAMES_112 MOEC_NAMES_104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define MOEC_NAMES_120 MOEC_NAMES_112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define MOEC_NAMES_128 MOEC_NAMES_120 ",%120,%121,%122,%123,%124,%125,%126,%127"
// d[64xN] (+)= a[64x16] b[Nx16]^T; d of a warp's 16 rows.
#define MOEC_WGMMA(type, columns, names, left, right, add_, ...)                                                       \
  MOEC_DEVICE void moec_wgmma_##type##_n##columns(float *d, unsigned long long a, unsigned long long b, int add) {     \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " add_ ", 0;\n"                                                        \
                 " wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." #type "." #type " {" names "}, " left        \
                 ", " right ", p, 1, 1, 0, 0;}"                                                                        \
                 : __VA_ARGS__                                                                                         \
                 : "l"(a), "l"(b), "r"(add));                                                                          \
  }
#define MOEC_WGMMA_OF_BOTH_TYPES(...) MOEC_WGMMA(f16, __VA_ARGS__) MOEC_WGMMA(bf16, __VA_ARGS__)
MOEC_WGMMA_OF_BOTH_TYPES(64, MOEC_NAMES_32, "%32", "%33", "%34", MOEC_SUMS_32)
MOEC_WGMMA_OF_BOTH_TYPES(96, MOEC_NAMES_48, "%48", "%49", "%50", MOEC_SUMS_48)
MOEC_WGMMA_OF_BOTH_TYPES(128, MOEC_NAMES_64, "%64", "%65", "%66", MOEC_SUMS_64)
MOEC_WGMMA_OF_BOTH_TYPES(160, MOEC_NAMES_80, "%80", "%81", "%82", MOEC_SUMS_80)
MOEC_WGMMA_OF_BOTH_TYPES(176, MOEC_NAMES_88, "%88", "%89", "%90", MOEC_SUMS_88)
MOEC_WGMMA_OF_BOTH_TYPES(192, MOEC_NAMES_96, "%96", "%97", "%98", MOEC_SUMS_96)
MOEC_WGMMA_OF_BOTH_TYPES(208, MOEC_NAMES_104, "%104", "%105", "%106", MOEC_SUMS_104)
MOEC_WGMMA_OF_BOTH_TYPES(224, MOEC_NAMES_112, "%112", "%113", "%114", MOEC_SUMS_112)
MOEC_WGMMA_OF_BOTH_TYPES(256, MOEC_NAMES_128, "%128", "%129", "%130", MOEC_SUMS_128)
// d += a b[16xN] with a[64x16] in registers as mma has it.
#define MOEC_WGMMA_ROWS(columns, names, rows, right, ...)                                                              \
  MOEC_DEVICE void moec_wgmma_f16_rows_n##columns(float *d, unsigned a0, unsigned a1, unsigned a2, unsigned a3,        \
                                                  unsigned long long b) {                                              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.f16.f16 {" names "}, {" rows "}, " right        \
                 ", 1, 1, 1, 1;"                                                                                       \
                 : __VA_ARGS__                                                                                         \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                                        \
  }
MOEC_WGMMA_ROWS(64, MOEC_NAMES_32, "%32,%33,%34,%35", "%36", MOEC_SUMS_32)
MOEC_WGMMA_ROWS(128, MOEC_NAMES_64, "%64,%65,%66,%67", "%68", MOEC_SUMS_64)
#endif

// Memory of the host, which the CPU reads and writes while a kernel runs. What was written before a release can be read
// by whoever has acquired that word; a barrier passes that on to the rest of the block.
MOEC_DEVICE long long moec_acquire_system(const void *word) {
  long long value;
  asm volatile("ld.acquire.sys.global.s64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
MOEC_DEVICE void moec_release_system(void *word, long long value) {
  asm volatile("st.release.sys.global.s64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
MOEC_DEVICE void moec_load_system_16(unsigned *to, const void *from) {  // never from a cache that may be behind
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from) : "memory");
}
MOEC_DEVICE long long moec_nanoseconds() {  // of a clock that all blocks share
  long long value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
}
