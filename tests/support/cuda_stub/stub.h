// A CUDA driver without a GPU: device memory is host memory, and nothing runs before somebody waits for it.
//
// Work is kept in its stream's queue until the stream or an event is waited for, so a host that writes too early to
// memory that a copy still has to read is found out. Addresses are checked against what was allocated.
#pragma once
#include <cuda.h>
#include <dlfcn.h>
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
struct Event { uint64_t ticket = 0; void *stream = nullptr; Graph *capture = nullptr; bool captured = false; };
struct Stream {
  std::deque<std::pair<uint64_t, Work>> queue;
  Graph *capture = nullptr;
  uint64_t last = 0;
  bool at_once = false;  // its work is done when it is put: that of a copy engine, beside kernels that wait for it
};
struct Kernel { void (*run)(void **, const int64_t *, int); const int *sizes; };
struct Module { void *library; };

inline std::recursive_mutex lock;
inline std::map<uintptr_t, size_t> device, pinned;
inline std::set<Stream *> streams;
inline std::set<Graph *> captures;
inline size_t used = 0, registered = 0;
inline uint64_t ticket = 0;
inline CUresult failed = CUDA_SUCCESS;
inline thread_local void *context = nullptr;
inline int live_graphs = 0, live_events = 0, live_modules = 0, launches = 0, copies = 0, retained = 0;

inline long setting(const char *name, long otherwise) {
  const char *text = std::getenv(name);
  return text ? std::atol(text) : otherwise;
}
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
  if (stream->capture) {
    stream->capture->works.push_back(std::move(work));
    stream->capture->last[stream] = stream->capture->works.size();
  }
  else stream->queue.emplace_back(stream->last = ++ticket, std::move(work));
  return CUDA_SUCCESS;
}
inline CUresult allocate(std::map<uintptr_t, size_t> &blocks, void **address, size_t size) {
  if (size == 0) return CUDA_ERROR_INVALID_VALUE;
  *address = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(*address, 0xCD, size);
  blocks[reinterpret_cast<uintptr_t>(*address)] = size;
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
