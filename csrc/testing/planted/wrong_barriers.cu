// Barriers that not every thread of the block reaches, in three ways; each right kernel copies n numbers.
#include "planted.h"

namespace {

// Planted: the two halves of the block wait at different barriers.
__global__ void divergent_barrier(Planted p) {
  int i = int(threadIdx.x);
  if (p.bug && i < p.n / 2)
    __syncthreads();
  else
    __syncthreads();
  p.out[i] = p.in[i];
}

// Planted: the barrier stands inside a condition that holds for a part of the threads.
__global__ void partial_barrier(Planted p) {
  int i = int(threadIdx.x);
  if (!p.bug || i % 2) __syncthreads();
  p.out[i] = p.in[i];
  __syncthreads();
}

// Planted: threads with nothing to do return before the barrier.
__global__ void early_exit(Planted p) {
  int i = int(threadIdx.x);
  if (p.bug && i >= p.n) return;
  __syncthreads();
  if (i < p.n) p.out[i] = p.in[i];
}

}  // namespace

extern "C" int planted_divergent_barrier(const Planted* p, void* stream) {
  // all threads of the right kernel take the second barrier
  return accel::launch(divergent_barrier, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_partial_barrier(const Planted* p, void* stream) {
  return accel::launch(partial_barrier, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_early_exit(const Planted* p, void* stream) {
  return accel::launch(early_exit, dim3(1), dim3(unsigned(p->n + 40)), 0, cudaStream_t(stream), *p);
}
