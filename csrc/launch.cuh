// What every kernel includes, and all it needs: one launch function and the few words that CUDA spells differently from
// the host. With ACCEL_HOST_CUDA the same source compiles with a C++ compiler and runs on the CPU (testing/README.md).
#pragma once

#ifdef ACCEL_HOST_CUDA
#include "testing/host.h"
#else

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// ACCEL_SHARED(float, tile, [32][33]): an array shared by the block, uninitialised, at a multiple of 16 bytes.
#define ACCEL_SHARED(type, name, dims) __shared__ __align__(16) type name dims

// ACCEL_DYNAMIC_SHARED(float, tile): a pointer to the memory whose size the launch gives.
#define ACCEL_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char accel_dynamic[]; \
  type* name = reinterpret_cast<type*>(accel_dynamic)

namespace accel {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A... arguments) {
  if (shared > (size_t{48} << 10)) {
    cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (refused != cudaSuccess) return refused;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, P(arguments)...);
}

// d (16 × 8, fp32) += a (16 × 16) · b (16 × 8), fragments as mma.sync holds them. T: __nv_bfloat16 or __half.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define ACCEL_MMA(type, name)                                                                                       \
  template <>                                                                                                       \
  __device__ __forceinline__ void mma_m16n8k16<type>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                             \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
  }
ACCEL_MMA(__nv_bfloat16, "bf16")
ACCEL_MMA(__half, "f16")
#undef ACCEL_MMA

// 16 bytes from global to shared memory, zeros if not `valid`; arrives when its group is waited for.
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `groups_left` groups of this thread are on their way. Other threads see the copies after a barrier.
template <int groups_left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

}  // namespace accel

#endif
