// Threads of a block as fibers: what they have begun, and how they wait for each other.
#pragma once
#include "emulator.h"

#include <vector>

#pragma GCC visibility push(hidden)
namespace emulator {
constexpr int kLanes = 32, kWords = 8;
enum State : uint8_t { kReady, kBarrier, kWarp, kPhase, kDone };
struct Phase { uint16_t count, left; uint32_t number; };  // of a barrier in shared memory
struct Copy { void *to; const void *from; bool valid; };
struct Store { void *to; const void *from; size_t bytes; };
struct Begun {
  std::vector<Copy> pending, committed;
  std::vector<size_t> groups;  // where each ends in what is committed
  std::vector<Store> stores;
};

[[noreturn]] void fail(const char *what);
Begun &begun();                               // by the thread that runs
void wait_for_block();                        // until all of its threads are here
void wait_for_phase(Phase *own, int parity);  // until its number has another parity
void wait_for_warp();
static inline int lane() { return threadIdx.x % kLanes; }
unsigned (*next_exchange())[kWords];
// Give words to the other lanes of the warp and get theirs.
template <int kCount> static inline auto exchange(const unsigned (&words)[kCount]) {
  auto *all = next_exchange();
  memcpy(all[lane()], words, sizeof words);
  wait_for_warp();
  return all;
}
}  // namespace emulator
#pragma GCC visibility pop
