// A CUDA driver without a GPU: device memory is host memory, and nothing runs before somebody waits for it.
//
// Work is kept in its stream's queue until the stream or an event is waited for, so a host that writes too early to
// memory that a copy still has to read is found out. Addresses are checked against what was allocated.
//
// Where there are several GPUs, work of one of them cannot touch the memory of another: that is protected meanwhile.
#pragma once
#include <cuda.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace stub {
using Work = std::function<CUresult()>;
// Works are in the order in which they were put; of each stream the number after its last, and how much of it the
// stream that is captured has waited for.
struct Graph { std::vector<Work> works; std::map<void *, size_t> last, joined; };
struct Event { uint64_t ticket = 0; void *stream = nullptr; Graph *capture = nullptr; bool captured = false; int gpu = 0; };
struct Stream {
  std::deque<std::pair<uint64_t, Work>> queue;
  Graph *capture = nullptr;
  uint64_t last = 0;
  bool at_once = false;  // its work is done when it is put: that of a copy engine, beside kernels that wait for it
  int gpu = 0;
};
struct Kernel { void (*run)(void **, const int64_t *, int); const int *sizes; };
struct Module { void *library; };

inline std::recursive_mutex lock;
constexpr int GPUS = 8;
constexpr uintptr_t CONTEXTS = 0x1000;
inline std::map<uintptr_t, size_t> gpus[GPUS], pinned;
inline std::set<Stream *> streams;
inline std::set<Graph *> captures;
inline size_t used[GPUS] = {}, registered = 0;
inline int open_gpu = -1, retained[GPUS] = {};
inline bool reached[GPUS][GPUS] = {};
inline uint64_t ticket = 0;
inline CUresult failed = CUDA_SUCCESS;
inline thread_local void *context = nullptr;
inline int live_graphs = 0, live_events = 0, live_modules = 0, launches = 0, copies = 0;

inline long setting(const char *name, long otherwise) {
  const char *text = std::getenv(name);
  return text ? std::atol(text) : otherwise;
}
inline int current() { return (int)((uintptr_t)context - CONTEXTS); }
inline bool several() { return setting("MOEC_STUB_GPUS", 1) > 1; }
inline size_t pages(size_t size) { return (size + 4095) / 4096 * 4096; }
// While it lives, the memory of one GPU is there, and that of no other.
struct Access {
  int before;
  explicit Access(int gpu) : before(open_gpu) { open(gpu); }
  ~Access() { open(before); }
  static void open(int gpu) {
    if (gpu == open_gpu || !several()) return;
    for (int each = 0; each < GPUS; ++each)
      if (each == gpu || each == open_gpu || open_gpu < 0)
        for (auto &[address, size] : gpus[each]) mprotect((void *)address, pages(size), each == gpu || gpu < 0 ? PROT_READ | PROT_WRITE : PROT_NONE);
    open_gpu = gpu;
  }
};
inline bool inside(const std::map<uintptr_t, size_t> &blocks, uintptr_t address, size_t size) {
  auto next = blocks.upper_bound(address);
  if (next == blocks.begin()) return false;
  auto block = std::prev(next);
  return address + size <= block->first + block->second;
}
inline CUresult complain(const char *what) {
  std::fprintf(stderr, "cuda stub: %s\n", what);
  return CUDA_ERROR_INVALID_VALUE;
}
inline CUresult run_until(Stream *stream, uint64_t until) {
  while (!stream->queue.empty() && stream->queue.front().first <= until) {
    Work work = std::move(stream->queue.front().second);
    stream->queue.pop_front();
    Access access(stream->gpu);
    if (CUresult result = work()) failed = result;
  }
  return failed;
}
inline CUresult put(CUstream handle, Work work) {
  if (reinterpret_cast<Stream *>(handle)->at_once) return context ? work() : CUDA_ERROR_INVALID_CONTEXT;
  std::lock_guard<std::recursive_mutex> guard(lock);
  auto *stream = reinterpret_cast<Stream *>(handle);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (!streams.count(stream)) return complain("not a stream");
  if (stream->gpu != current()) return complain("a stream of another GPU than the thread's");
  if (stream->capture) {
    stream->capture->works.push_back(std::move(work));
    stream->capture->last[stream] = stream->capture->works.size();
  }
  else stream->queue.emplace_back(stream->last = ++ticket, std::move(work));
  return CUDA_SUCCESS;
}
// Memory of a GPU, of which whole pages can be protected.
inline CUresult allocate_device(int gpu, void **address, size_t size) {
  if (size == 0) return CUDA_ERROR_INVALID_VALUE;
  *address = mmap(nullptr, pages(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::memset(*address, 0xCD, size);
  gpus[gpu][reinterpret_cast<uintptr_t>(*address)] = size;
  if (several() && open_gpu >= 0 && gpu != open_gpu) mprotect(*address, pages(size), PROT_NONE);
  return CUDA_SUCCESS;
}
inline CUresult allocate(std::map<uintptr_t, size_t> &blocks, void **address, size_t size) {
  if (size == 0) return CUDA_ERROR_INVALID_VALUE;
  *address = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(*address, 0xCD, size);
  blocks[reinterpret_cast<uintptr_t>(*address)] = size;
  return CUDA_SUCCESS;
}
inline CUresult release_device(int gpu, uintptr_t address) {
  auto block = gpus[gpu].find(address);
  if (block == gpus[gpu].end()) return complain("freed twice, never allocated, or memory of another GPU");
  for (Stream *stream : streams) run_until(stream, ~0ull);
  munmap((void *)address, pages(block->second));
  used[gpu] -= block->second;
  gpus[gpu].erase(block);
  return CUDA_SUCCESS;
}
inline CUresult release(std::map<uintptr_t, size_t> &blocks, void *address) {
  auto block = blocks.find(reinterpret_cast<uintptr_t>(address));
  if (block == blocks.end()) return complain("freed twice, or never allocated");
  for (Stream *stream : streams) run_until(stream, ~0ull);
  std::memset(address, 0xDD, block->second);
  std::free(address);
  blocks.erase(block);
  return CUDA_SUCCESS;
}
}  // namespace stub
