#include "cuda/_runtime.h"

#include <cuda_runtime.h>

static __global__ void nothing() {}

extern "C" int accel_cuda_set_device(int device) { return cudaSetDevice(device); }

extern "C" int accel_cuda_probe(int device) {
  cudaError_t error = cudaSetDevice(device);
  cudaFuncAttributes found;
  return error == cudaSuccess ? cudaFuncGetAttributes(&found, nothing) : error;
}

extern "C" const char* accel_cuda_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

static int ask(cudaDeviceAttr what, int device, int otherwise) {
  int found = 0;
  cudaError_t error = cudaDeviceGetAttribute(&found, what, device);
  return error == cudaSuccess && found > 0 ? found : otherwise;
}

extern "C" int accel_cuda_processors(int device) { return ask(cudaDevAttrMultiProcessorCount, device, 1); }

extern "C" int accel_cuda_shared_memory(int device) {
  return ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, 48 << 10);
}
