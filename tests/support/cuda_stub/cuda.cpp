// libcuda.so.1 of the stub: the functions that moec's runtime, TVM's CUDA library and cuda-bindings ask for.
#include "stub.h"

using namespace stub;
#define GUARD std::lock_guard<std::recursive_mutex> guard(lock)
#define EXPORT extern "C" __attribute__((visibility("default"))) CUresult

EXPORT cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
EXPORT cuDeviceGetCount(int *count) { return *count = (int)setting("MOEC_STUB_GPUS", 1), CUDA_SUCCESS; }
EXPORT cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
EXPORT cuDeviceGetName(char *name, int size, CUdevice device) {
  device ? std::snprintf(name, size, "Stub GPU %d", device) : std::snprintf(name, size, "Stub GPU");
  return CUDA_SUCCESS;
}
EXPORT cuDeviceTotalMem(size_t *bytes, CUdevice) { return *bytes = setting("MOEC_STUB_MEMORY", 1 << 30), CUDA_SUCCESS; }
EXPORT cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  long capability = setting("MOEC_STUB_CAPABILITY", 90);
  if (device) capability = setting("MOEC_STUB_SECOND_CAPABILITY", capability);
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? (int)capability / 10
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? (int)capability % 10
                                                                       : 1;
  return CUDA_SUCCESS;
}
EXPORT cuDevicePrimaryCtxRetain(CUcontext *result, CUdevice device) {
  GUARD;
  return retained[device]++, *result = reinterpret_cast<CUcontext>(CONTEXTS + device), CUDA_SUCCESS;
}
EXPORT cuDevicePrimaryCtxRelease(CUdevice device) {
  GUARD;
  if (--retained[device] == 0)
    for (int other = 0; other < GPUS; ++other) reached[device][other] = reached[other][device] = false;
  return CUDA_SUCCESS;
}
EXPORT cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice other) {
  return *can = device != other && setting("MOEC_STUB_PEERS", 1), CUDA_SUCCESS;
}
EXPORT cuCtxEnablePeerAccess(CUcontext other, unsigned) {
  GUARD;
  bool &known = reached[current()][(uintptr_t)other - CONTEXTS];
  if (!setting("MOEC_STUB_PEERS", 1)) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
  return known ? CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED : (known = true, CUDA_SUCCESS);
}
EXPORT cuCtxSetCurrent(CUcontext value) { return context = value, CUDA_SUCCESS; }
EXPORT cuCtxGetCurrent(CUcontext *value) { return *value = (CUcontext)context, CUDA_SUCCESS; }
EXPORT cuMemGetInfo(size_t *free, size_t *total) {
  GUARD;
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  *total = setting("MOEC_STUB_MEMORY", 1 << 30), *free = *total - used[current()];
  return CUDA_SUCCESS;
}
EXPORT cuMemAlloc(CUdeviceptr *address, size_t size) {
  GUARD;
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  int gpu = current();
  if (used[gpu] + size > (size_t)setting("MOEC_STUB_MEMORY", 1 << 30)) return CUDA_ERROR_OUT_OF_MEMORY;
  used[gpu] += size;
  return allocate_device(gpu, reinterpret_cast<void **>(address), size);
}
EXPORT cuMemFree(CUdeviceptr address) {
  GUARD;
  return context ? release_device(current(), address) : CUDA_ERROR_INVALID_CONTEXT;
}
EXPORT cuMemHostAlloc(void **address, size_t size, unsigned) {
  GUARD;
  return context ? allocate(pinned, address, size) : CUDA_ERROR_INVALID_CONTEXT;
}
EXPORT cuMemFreeHost(void *address) {
  GUARD;
  return release(pinned, address);
}
EXPORT cuMemHostRegister(void *address, size_t size, unsigned) {
  GUARD;
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  if (registered + size > (size_t)setting("MOEC_STUB_PINNED", 1l << 40)) return CUDA_ERROR_OUT_OF_MEMORY;
  registered += size;
  return pinned[(uintptr_t)address] = size, CUDA_SUCCESS;
}
EXPORT cuMemHostUnregister(void *address) {
  GUARD;
  auto block = pinned.find((uintptr_t)address);
  if (block == pinned.end()) return complain("unregistered twice, or never registered");
  for (Stream *stream : streams) run_until(stream, ~0ull);
  registered -= block->second;
  return pinned.erase(block), CUDA_SUCCESS;
}
EXPORT cuStreamCreate(CUstream *stream, unsigned) {
  GUARD;
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  auto *made = new Stream;
  made->gpu = current();
  streams.insert(made);
  return *stream = reinterpret_cast<CUstream>(made), CUDA_SUCCESS;
}
EXPORT cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int) {
  CUresult result = cuStreamCreate(stream, flags);
  return ((Stream *)*stream)->at_once = true, result;
}
EXPORT cuStreamWriteValue32(CUstream stream, CUdeviceptr to, cuuint32_t value, unsigned) {
  if (!inside(gpus[current()], to, 4)) return complain("a value to memory that is not the device's");
  return put(stream, [=] { return __atomic_store_n((uint32_t *)to, value, __ATOMIC_RELEASE), CUDA_SUCCESS; });
}
EXPORT cuStreamDestroy(CUstream stream) {
  GUARD;
  run_until((Stream *)stream, ~0ull);
  return streams.erase((Stream *)stream) ? CUDA_SUCCESS : complain("a stream that is not there");
}
EXPORT cuStreamSynchronize(CUstream stream) {
  GUARD;
  if (((Stream *)stream)->capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  return run_until((Stream *)stream, ~0ull);
}
EXPORT cuEventCreate(CUevent *event, unsigned) {
  GUARD;
  auto *made = new Event;
  made->gpu = current();
  return live_events++, *event = reinterpret_cast<CUevent>(made), CUDA_SUCCESS;
}
EXPORT cuEventDestroy(CUevent event) {
  GUARD;
  return live_events--, delete (Event *)event, CUDA_SUCCESS;
}
EXPORT cuEventRecord(CUevent event, CUstream stream) {
  GUARD;
  auto *own = (Event *)event;
  if (own->gpu != ((Stream *)stream)->gpu) return complain("an event is recorded in a stream of another GPU");
  own->stream = stream, own->capture = ((Stream *)stream)->capture, own->captured = own->capture;
  own->ticket = own->capture ? own->capture->last[stream] : ((Stream *)stream)->last;
  return CUDA_SUCCESS;
}
EXPORT cuEventSynchronize(CUevent event) {
  GUARD;
  auto *own = (Event *)event;
  return own->stream && streams.count((Stream *)own->stream) ? run_until((Stream *)own->stream, own->ticket) : CUDA_SUCCESS;
}
EXPORT cuEventQuery(CUevent event) {
  GUARD;
  auto *own = (Event *)event;
  if (!own->stream || !streams.count((Stream *)own->stream)) return CUDA_SUCCESS;
  auto &queue = ((Stream *)own->stream)->queue;
  return !queue.empty() && queue.front().first <= own->ticket ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}
EXPORT cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
  GUARD;
  Event seen = *(Event *)event;
  auto *waiting = (Stream *)stream;
  if (waiting->capture != seen.capture && waiting->capture) return complain("a capture waits for what is outside of it");
  if (seen.captured) {  // the stream becomes a part of the capture
    if (!captures.count(seen.capture)) return complain("a wait for a mark of a capture that is over");
    waiting->capture = seen.capture;
    size_t &joined = seen.capture->joined[seen.stream];
    return joined = std::max(joined, (size_t)seen.ticket), CUDA_SUCCESS;
  }
  if (!seen.stream) return CUDA_SUCCESS;
  return put(stream, [=] { return streams.count((Stream *)seen.stream) ? run_until((Stream *)seen.stream, seen.ticket) : CUDA_SUCCESS; });
}
EXPORT cuEventElapsedTime(float *milliseconds, CUevent, CUevent) { return *milliseconds = 1.0f, CUDA_SUCCESS; }
EXPORT cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
  if (!inside(gpus[current()], to, size)) return complain("a copy to memory that is not the device's");
  if (!inside(pinned, (uintptr_t)from, size)) return complain("a copy from memory that is not pinned");
  return put(stream, [=] { return copies++, std::memcpy((void *)to, from, size), CUDA_SUCCESS; });
}
EXPORT cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
  if (!inside(gpus[current()], from, size)) return complain("a copy from memory that is not the device's");
  if (!inside(pinned, (uintptr_t)to, size)) return complain("a copy to memory that is not pinned");
  return put(stream, [=] { return std::memcpy(to, (void *)from, size), CUDA_SUCCESS; });
}
EXPORT cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  if (!inside(gpus[current()], from, size) || !inside(gpus[current()], to, size)) return complain("a copy outside the device's memory");
  return put(stream, [=] { return std::memmove((void *)to, (void *)from, size), CUDA_SUCCESS; });
}
EXPORT cuMemcpyPeerAsync(CUdeviceptr to, CUcontext to_context, CUdeviceptr from, CUcontext from_context, size_t size, CUstream stream) {
  int target = (uintptr_t)to_context - CONTEXTS, source = (uintptr_t)from_context - CONTEXTS;
  if (!inside(gpus[source], from, size) || !inside(gpus[target], to, size)) return complain("a copy outside the devices' memory");
  if (current() != target || !reached[target][source]) return complain("a copy from a GPU that this one does not reach");
  return put(stream, [=] {
    std::vector<char> passing(size);
    { Access access(source); std::memcpy(passing.data(), (void *)from, size); }
    return std::memcpy((void *)to, passing.data(), size), CUDA_SUCCESS;
  });
}
EXPORT cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream stream) {
  if (!inside(gpus[current()], to, size)) return complain("a fill outside the device's memory");
  return put(stream, [=] { return std::memset((void *)to, value, size), CUDA_SUCCESS; });
}
EXPORT cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode) {
  GUARD;
  captures.insert(((Stream *)stream)->capture = new Graph);
  return CUDA_SUCCESS;
}
EXPORT cuStreamEndCapture(CUstream stream, CUgraph *graph) {
  GUARD;
  Graph *own = ((Stream *)stream)->capture;
  *graph = (CUgraph)own;
  captures.erase(own);
  for (Stream *other : streams)
    if (other->capture == own) other->capture = nullptr;
  for (auto &[other, last] : own->last)
    if (other != stream && own->joined[other] < last) return complain("a branch of a capture that was not joined");
  return CUDA_SUCCESS;
}
EXPORT cuGraphInstantiate(CUgraphExec *made, CUgraph graph, unsigned long long) {
  GUARD;
  return live_graphs++, *made = (CUgraphExec) new Graph(*(Graph *)graph), CUDA_SUCCESS;
}
EXPORT cuGraphDestroy(CUgraph graph) { return delete (Graph *)graph, CUDA_SUCCESS; }
EXPORT cuGraphExecDestroy(CUgraphExec graph) {
  GUARD;
  return live_graphs--, delete (Graph *)graph, CUDA_SUCCESS;
}
EXPORT cuGraphLaunch(CUgraphExec graph, CUstream stream) {
  GUARD;
  for (Work &work : ((Graph *)graph)->works) put(stream, work);
  return CUDA_SUCCESS;
}
// The image is text: the path of a library made by the emulator.
EXPORT cuModuleLoadData(CUmodule *module, const void *image) {
  GUARD;
  for (Stream *stream : streams)
    if (stream->capture) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  auto *made = new Module;
  made->library = dlopen((const char *)image, RTLD_NOW | RTLD_LOCAL);
  if (!made->library) return complain(dlerror()), CUDA_ERROR_NO_BINARY_FOR_GPU;
  return live_modules++, *module = (CUmodule)made, CUDA_SUCCESS;
}
EXPORT cuModuleUnload(CUmodule module) {
  GUARD;
  return live_modules--, delete (Module *)module, CUDA_SUCCESS;
}
EXPORT cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  auto *own = (Module *)module;
  void *symbol = dlsym(own->library, (std::string("emulate_") + name).c_str());
  void *sizes = dlsym(own->library, (std::string("sizes_") + name).c_str());
  if (!symbol || !sizes) return CUDA_ERROR_NOT_FOUND;
  *function = (CUfunction) new Kernel{(void (*)(void **, const int64_t *, int))symbol, (const int *)sizes};
  return CUDA_SUCCESS;
}
EXPORT cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORT cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **) {
  auto *kernel = (Kernel *)function;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION &&
        setting("MOEC_STUB_CAPABILITY", 90) < 90)
      return complain("an early launch on a GPU that has none");
  std::vector<std::vector<char>> values;
  for (int i = 0; kernel->sizes[i]; ++i)
    values.emplace_back((char *)arguments[i], (char *)arguments[i] + kernel->sizes[i]);
  int64_t x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
  int threads = (int)config->blockDimX;
  return put(config->hStream, [=]() mutable {
    std::vector<void *> places;
    for (auto &value : values) places.push_back(value.data());
    int64_t grid[3] = {x, y, z};
    if (std::getenv("MOEC_STUB_TRACE")) { Dl_info info; dladdr((void *)kernel->run, &info); std::fprintf(stderr, "run %s grid %ld %ld %ld threads %d\n", info.dli_sname, x, y, z, threads); }
    return launches++, kernel->run(places.data(), grid, threads), CUDA_SUCCESS;
  });
}
extern "C" __attribute__((visibility("default"))) int stub_tensor_map() __asm__("cuTensorMapEncodeTiled");
int stub_tensor_map() { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORT cuGetErrorName(CUresult error, const char **text) {
  static thread_local char name[40];
  std::snprintf(name, sizeof name, "CUDA_ERROR_%d", (int)error);
  return *text = name, CUDA_SUCCESS;
}
EXPORT cuGetErrorString(CUresult error, const char **text) { return cuGetErrorName(error, text); }
#undef cuGetProcAddress
EXPORT cuGetProcAddress_v2(const char *symbol, void **function, int, cuuint64_t, CUdriverProcAddressQueryResult *found) {
  std::string name = symbol;
  *function = nullptr;
  if (name == "cuGraphInstantiate") name += "WithFlags";
  if (name == "cuGetProcAddress") name += "_v2";
  for (const char *suffix : {"_v3", "_v2", ""})
    if (*function == nullptr) *function = dlsym(RTLD_DEFAULT, (name + suffix).c_str());
  if (found) *found = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
// What is alive, for tests.
extern "C" __attribute__((visibility("default"))) void stub_counts(int64_t *counts) {
  GUARD;
  int64_t bytes = 0, blocks = 0, contexts = 0;
  for (int gpu = 0; gpu < GPUS; ++gpu) bytes += used[gpu], blocks += gpus[gpu].size(), contexts += retained[gpu];
  int64_t all[] = {bytes, blocks, (int64_t)pinned.size(), (int64_t)streams.size(), live_events,
                   live_graphs, live_modules, launches, copies, contexts};
  std::memcpy(counts, all, sizeof all);
}
