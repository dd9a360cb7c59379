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

extern "C" int accel_cuda_processors(int device) {
  int count = 0;
  cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess && count > 0 ? count : 1;
}
