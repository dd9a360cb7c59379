// Shared memory read before it is written, and written or read outside its bounds.
#include "planted.h"

namespace {

constexpr int bins = 16;

// Counts of n numbers below 16. Planted: the counters do not begin at zero.
__global__ void uninitialised_shared(Planted p) {
  ACCEL_SHARED(int, count, [bins]);
  int i = int(threadIdx.x);
  if (!p.bug && i < bins) count[i] = 0;
  __syncthreads();
  atomicAdd(&count[p.in[i] & (bins - 1)], 1);
  __syncthreads();
  if (i < bins) p.out[i] = count[i];
}

// Copies n numbers through a window that it shifts by one. Planted: one element too far, written.
__global__ void write_past_shared(Planted p) {
  ACCEL_SHARED(int, tile, [64]);
  int i = int(threadIdx.x);
  int* hidden = tile;  // the compiler no longer knows the bound
  hidden[p.bug ? i + 1 : i] = p.in[i];
  __syncthreads();
  p.out[i] = hidden[p.bug ? i + 1 : i];
}

// Planted: one element too far, read; what is there does not reach the result.
__global__ void read_past_shared(Planted p) {
  ACCEL_SHARED(int, tile, [64]);
  int i = int(threadIdx.x);
  tile[i] = p.in[i];
  __syncthreads();
  int* hidden = tile;
  int next = hidden[i + 1 < p.n || p.bug ? i + 1 : i];
  p.out[i] = i + 1 < p.n ? next : tile[i];
}

// Planted: the launch gives less dynamic shared memory than the kernel uses.
__global__ void small_dynamic_shared(Planted p) {
  ACCEL_DYNAMIC_SHARED(int, tile);
  int i = int(threadIdx.x);
  tile[i] = p.in[i];
  __syncthreads();
  p.out[i] = tile[i];
}

}  // namespace

extern "C" int planted_uninitialised_shared(const Planted* p, void* stream) {
  return accel::launch(uninitialised_shared, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_write_past_shared(const Planted* p, void* stream) {
  return accel::launch(write_past_shared, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_read_past_shared(const Planted* p, void* stream) {
  return accel::launch(read_past_shared, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_small_dynamic_shared(const Planted* p, void* stream) {
  size_t bytes = (size_t(p->n) - (p->bug ? 1 : 0)) * sizeof(int);
  return accel::launch(small_dynamic_shared, dim3(1), dim3(unsigned(p->n)), bytes, cudaStream_t(stream), *p);
}
