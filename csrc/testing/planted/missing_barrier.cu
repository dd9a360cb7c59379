// Reverses n ≤ 256 numbers through shared memory. Planted: no barrier between writing and reading.
#include "planted.h"

namespace {

__global__ void missing_barrier(Planted p) {
  ACCEL_SHARED(int, tile, [256]);
  int i = int(threadIdx.x);
  tile[i] = p.in[i];
  if (!p.bug) __syncthreads();
  p.out[i] = tile[p.n - 1 - i];
}

}  // namespace

extern "C" int planted_missing_barrier(const Planted* p, void* stream) {
  return accel::launch(missing_barrier, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
