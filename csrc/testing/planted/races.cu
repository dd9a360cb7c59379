// Races: some change the result in some order of warps, some in none that a run on one core can show.
#include "planted.h"

namespace {

constexpr int bins = 16, threads = 128;

// Counts of numbers below 16. Planted: the counters grow without an atomic.
__global__ void racy_histogram(Planted p) {
  ACCEL_SHARED(int, count, [bins]);
  int i = int(threadIdx.x);
  if (i < bins) count[i] = 0;
  __syncthreads();
  int* counter = &count[p.in[i] & (bins - 1)];
  if (p.bug)
    *counter += 1;
  else
    atomicAdd(counter, 1);
  __syncthreads();
  if (i < bins) p.out[i] = count[i];
}

// Each lane takes what the lane below wrote. Planted: no __syncwarp between them.
__global__ void missing_syncwarp(Planted p) {
  ACCEL_SHARED(int, tile, [threads]);
  int i = int(threadIdx.x);
  tile[i] = p.in[i];
  if (!p.bug) __syncwarp();
  p.out[i] = i % 32 ? tile[i - 1] : tile[i];
}

// A shuffle moves its value and orders nothing else. Planted: it stands in for the __syncwarp.
__global__ void shuffle_as_fence(Planted p) {
  ACCEL_SHARED(int, tile, [threads]);
  int i = int(threadIdx.x);
  tile[i] = p.in[i];
  int zero = __shfl_sync(0xffffffffu, 0, 0);
  if (!p.bug) __syncwarp();
  p.out[i] = (i % 32 ? tile[i - 1] : tile[i]) + zero;
}

// Each half of a warp takes what the other half wrote. Planted: the halves wait only for themselves.
__global__ void half_a_warp(Planted p) {
  ACCEL_SHARED(int, tile, [threads]);
  int i = int(threadIdx.x);
  tile[i] = p.in[i];
  __syncwarp(i % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  if (i % 32 < 16) __syncwarp(0x0000ffffu);
  if (!p.bug) __syncwarp();
  p.out[i] = tile[i ^ 16];
}

// Rotates a row twice through the same buffer. Planted: no barrier between reading it and writing it again.
__global__ void write_after_read(Planted p) {
  ACCEL_SHARED(int, tile, [threads]);
  int i = int(threadIdx.x), value = p.in[i];
  for (int round = 0; round < 2; ++round) {
    tile[i] = value;
    __syncthreads();
    value = tile[(i + 32) % threads];
    if (!p.bug) __syncthreads();
  }
  p.out[i] = value;
}

// The sum of all blocks in out[0], each block waiting at a barrier of its own first. Planted: no atomic.
__global__ void racy_sum(Planted p) {
  __syncthreads();
  if (threadIdx.x) return;
  if (p.bug)
    p.out[0] += p.in[blockIdx.x];
  else
    atomicAdd(&p.out[0], p.in[blockIdx.x]);
}

// Planted: blocks add floats in whatever order they come; the right kernel adds in one order.
__global__ void unordered_sum(Planted p) {
  float* sum = reinterpret_cast<float*>(p.out);
  if (p.bug) {
    atomicAdd(sum, 1.f / float(p.in[blockIdx.x] + 3));
  } else if (blockIdx.x == 0) {
    float s = 0.f;
    for (int i = 0; i < p.n; ++i) s += 1.f / float(p.in[i] + 3);
    *sum = s;
  }
}

int run(void (*kernel)(Planted), unsigned blocks, unsigned size, const Planted* p, void* stream) {
  return accel::launch(kernel, dim3(blocks), dim3(size), 0, cudaStream_t(stream), *p);
}

}  // namespace

extern "C" int planted_racy_histogram(const Planted* p, void* stream) {
  return run(racy_histogram, 1, threads, p, stream);
}
extern "C" int planted_missing_syncwarp(const Planted* p, void* stream) {
  return run(missing_syncwarp, 1, threads, p, stream);
}
extern "C" int planted_shuffle_as_fence(const Planted* p, void* stream) {
  return run(shuffle_as_fence, 1, threads, p, stream);
}
extern "C" int planted_half_a_warp(const Planted* p, void* stream) { return run(half_a_warp, 1, threads, p, stream); }
extern "C" int planted_write_after_read(const Planted* p, void* stream) {
  return run(write_after_read, 1, threads, p, stream);
}
extern "C" int planted_racy_sum(const Planted* p, void* stream) { return run(racy_sum, unsigned(p->n), 32, p, stream); }
extern "C" int planted_unordered_sum(const Planted* p, void* stream) {
  return run(unordered_sum, unsigned(p->n), 1, p, stream);
}
