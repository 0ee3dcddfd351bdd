// In place of functions of libcudart.so.13: TVM's CUDA library links these; it calls the first two.
#include <cuda.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int cudaSetDevice(int device) { return (int)cuCtxSetCurrent((CUcontext)(long)(0x1000 + device)); }
EXPORT int cudaGetDevice(int *device) {
  CUcontext context;
  cuCtxGetCurrent(&context);
  return *device = (int)((long)context - 0x1000), context ? 0 : 201;
}
EXPORT const char *cudaGetErrorString(int) { return "an error of the stub"; }
EXPORT const char *cudaGetErrorName(int) { return "cudaErrorStub"; }
// What torch asks, where it is made for CUDA: there is no GPU for it.
EXPORT int cudaGetDeviceCount(int *count) { return *count = 0, 100; }
#define MISSING(name) EXPORT int name() { return 999; }
MISSING(cudaDeviceGetAttribute) MISSING(cudaEventCreate) MISSING(cudaEventDestroy) MISSING(cudaEventElapsedTime)
MISSING(cudaEventRecord) MISSING(cudaEventSynchronize) MISSING(cudaFree) MISSING(cudaFreeHost)
MISSING(cudaGetDeviceProperties) MISSING(cudaGetLastError) MISSING(cudaGraphDestroy)
MISSING(cudaGraphExecDestroy) MISSING(cudaGraphInstantiate) MISSING(cudaGraphLaunch) MISSING(cudaMalloc)
MISSING(cudaMallocHost) MISSING(cudaMemGetInfo) MISSING(cudaMemcpyAsync) MISSING(cudaMemcpyPeerAsync)
MISSING(cudaPeekAtLastError) MISSING(cudaStreamBeginCapture) MISSING(cudaStreamCreate)
MISSING(cudaStreamCreateWithFlags) MISSING(cudaStreamDestroy) MISSING(cudaStreamEndCapture)
MISSING(cudaStreamSynchronize) MISSING(cudaStreamWaitEvent)
