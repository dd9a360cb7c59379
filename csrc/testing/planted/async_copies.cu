// Asynchronous copies: four tiles of n numbers each are summed, while the next is on its way.
#include "planted.h"

namespace {

constexpr int tiles = 4, threads = 64;

template <bool no_wait, bool no_barrier>
__device__ void sum_tiles(const Planted& p) {
  ACCEL_SHARED(int, buffer, [2][4 * threads]);
  int i = int(threadIdx.x), sum = 0;
  accel::cp_async16(&buffer[0][4 * i], p.in + 4 * i);
  accel::cp_async_commit();
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles) accel::cp_async16(&buffer[(t + 1) % 2][4 * i], p.in + (t + 1) * 4 * threads + 4 * i);
    accel::cp_async_commit();
    if (!(no_wait && p.bug)) accel::cp_async_wait<1>();
    __syncthreads();
    for (int j = 0; j < 4; ++j) sum += buffer[t % 2][(4 * i + 4 * 32 + j) % (4 * threads)];
    if (!(no_barrier && p.bug)) __syncthreads();
  }
  p.out[i] = sum;
}

// Planted: nothing waits for the copy.
__global__ void missing_async_wait(Planted p) { sum_tiles<true, false>(p); }

// Planted: the buffer is filled again while other warps still read it.
__global__ void early_overwrite(Planted p) { sum_tiles<false, true>(p); }

}  // namespace

extern "C" int planted_missing_async_wait(const Planted* p, void* stream) {
  return accel::launch(missing_async_wait, dim3(1), dim3(threads), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_early_overwrite(const Planted* p, void* stream) {
  return accel::launch(early_overwrite, dim3(1), dim3(threads), 0, cudaStream_t(stream), *p);
}
