// CUDA kernels on the CPU: one block after the other, one fiber a thread, for tests of what a kernel computes.
//
// Barriers and warp-wide operations are rendezvous points between fibers. What a GPU would forgive or hang on is an
// error here: a barrier that not all threads reach, a warp operation that some lanes skip.
#include "fibers.h"

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

Dim3 blockIdx, threadIdx, blockDim, gridDim;
alignas(1024) unsigned char emulated_dynamic[kDynamicBytes];

namespace emulator {
namespace {
constexpr int kMostThreads = 1024;
constexpr size_t kStack = 256 << 10;
typedef void *Place[5];  // of GCC's own setjmp, which saves as little as there is to save
struct Fiber {
  Place place;
  bool started;
  Phase *phase;
  int parity;
  unsigned turn;
  Begun begun;
};
struct Exchange { unsigned words[2][kLanes][kWords]; };
Fiber fibers[kMostThreads];
State states[kMostThreads];
Exchange exchanges[kMostThreads / kLanes];
char *stacks;
int current = -1, threads;
Place scheduler;
void (*kernel)(void *);
void *parameters;

void entry();
[[noreturn]] void start(int thread) {
  fibers[thread].started = true;
  ucontext_t own;
  getcontext(&own);
  own.uc_stack.ss_sp = &stacks[thread * kStack];
  own.uc_stack.ss_size = kStack;
  makecontext(&own, entry, 0);
  setcontext(&own);
  abort();
}
// Go on with the next thread that may, or where all of them have been asked.
[[noreturn]] __attribute__((noinline)) void resume_from(int thread) {
  while (thread < threads && states[thread] != kReady) ++thread;
  current = thread;
  if (thread == threads) __builtin_longjmp(scheduler, 1);
  threadIdx = {thread, 0, 0};
  if (!fibers[thread].started) start(thread);
  __builtin_longjmp(fibers[thread].place, 1);
}
__attribute__((noinline)) void yield(State state) {
  states[current] = state;
  if (__builtin_setjmp(fibers[current].place) == 0) resume_from(current + 1);
}
__attribute__((noinline)) void resume_all() {
  if (__builtin_setjmp(scheduler) == 0) resume_from(0);
}
void entry() {
  for (;;) {  // a fiber lives on from block to block
    kernel(parameters);
    if (!begun().pending.empty()) fail("cp.async that was never committed");
    if (!begun().stores.empty()) fail("a store in one go that was never waited for");
    yield(kDone);
  }
}
bool release(int first, int count, State state) {
  int waiting = 0, done = 0;
  for (int i = first; i < first + count; ++i) {
    waiting += states[i] == state;
    done += states[i] == kDone;
  }
  if (waiting == 0 || waiting + done < count) return false;
  if (state == kWarp && done) fail("a warp operation after some lanes have returned");
  for (int i = first; i < first + count; ++i)
    if (states[i] == state) states[i] = kReady;
  return true;
}
bool pass_phases() {
  bool passed = false;
  for (int i = 0; i < threads; ++i)
    if (states[i] == kPhase && (int)(fibers[i].phase->number & 1) != fibers[i].parity)
      states[i] = kReady, passed = true;
  return passed;
}
bool all_done() {
  for (int i = 0; i < threads; ++i)
    if (states[i] != kDone) return false;
  return true;
}
void run_block() {
  for (int i = 0; i < threads; ++i) {
    states[i] = kReady;
    fibers[i].turn = 0;
    fibers[i].begun.committed.clear(), fibers[i].begun.groups.clear();
  }
  for (resume_all(); !all_done(); resume_all()) {
    bool advanced = false;
    for (int first = 0; first < threads; first += kLanes)
      advanced |= release(first, min(kLanes, threads - first), kWarp);
    advanced |= release(0, threads, kBarrier);
    advanced |= pass_phases();
    if (!advanced) fail("threads wait for each other at different places");
  }
}
}  // namespace

void fail(const char *what) {
  fprintf(stderr, "emulator: %s (block %d %d %d, thread %d)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, current);
  abort();
}
Begun &begun() { return fibers[current].begun; }
void wait_for_block() { yield(kBarrier); }
void wait_for_phase(Phase *own, int parity) {
  if ((int)(own->number & 1) != parity) return;
  fibers[current].phase = own, fibers[current].parity = parity;
  yield(kPhase);
}
unsigned (*next_exchange())[kWords] { return exchanges[current / kLanes].words[fibers[current].turn++ & 1]; }
void wait_for_warp() { yield(kWarp); }
}  // namespace emulator

void moec_emulate(void (*body)(void *), void *arguments, const int64_t *grid, int count) {
  using namespace emulator;
  if (count > kMostThreads) fail("more threads than a block may have");
  if (!stacks) stacks = (char *)malloc(kMostThreads * kStack);  // only what is used of it becomes memory
  kernel = body, parameters = arguments, threads = count;
  blockDim = {threads, 1, 1}, gridDim = {(int)grid[0], (int)grid[1], (int)grid[2]};
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0]; ++x) blockIdx = {x, y, z}, run_block();
}
