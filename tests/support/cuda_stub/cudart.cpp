// libcudart.so.13 of the stub: TVM's CUDA library links these; it calls the first two.
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
#define MISSING(name) EXPORT int name() { return 999; }
MISSING(cudaDeviceGetAttribute) MISSING(cudaEventCreate) MISSING(cudaEventDestroy) MISSING(cudaEventElapsedTime)
MISSING(cudaEventRecord) MISSING(cudaEventSynchronize) MISSING(cudaFree) MISSING(cudaFreeHost)
MISSING(cudaGetDeviceCount) MISSING(cudaGetDeviceProperties) MISSING(cudaGetLastError) MISSING(cudaGraphDestroy)
MISSING(cudaGraphExecDestroy) MISSING(cudaGraphInstantiate) MISSING(cudaGraphLaunch) MISSING(cudaMalloc)
MISSING(cudaMallocHost) MISSING(cudaMemGetInfo) MISSING(cudaMemcpyAsync) MISSING(cudaMemcpyPeerAsync)
MISSING(cudaPeekAtLastError) MISSING(cudaStreamBeginCapture) MISSING(cudaStreamCreate)
MISSING(cudaStreamCreateWithFlags) MISSING(cudaStreamDestroy) MISSING(cudaStreamEndCapture)
MISSING(cudaStreamSynchronize) MISSING(cudaStreamWaitEvent)
