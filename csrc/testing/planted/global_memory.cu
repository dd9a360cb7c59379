// Global memory outside a tensor, at a wrong alignment, or at an index made from what is not a number.
#include "planted.h"

namespace {

// Planted: the grid covers more than n elements and nothing stops the last threads.
__global__ void past_the_tensor(Planted p) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < p.n || p.bug) p.out[i] = p.in[i];
}

// Sums of four. Planted: the vector load begins at an odd element.
__global__ void misaligned_vector(Planted p) {
  int i = int(threadIdx.x);
  int4 four = *reinterpret_cast<const int4*>(p.in + 4 * (i / 2) + (p.bug && i == 2 ? 1 : 0));
  p.out[i] = four.x + four.y + four.z + four.w;
}

// Indices computed in floating point. Planted: a NaN becomes an index without a test.
__global__ void nan_index(Planted p) {
  int i = int(threadIdx.x);
  float at = i == 3 ? __int_as_float(0x7fc00000) : float(i);
  bool inside = at >= 0.f && at < float(p.n);
  p.out[i] = inside || p.bug ? p.in[int(at) & 31] : -1;
}

}  // namespace

extern "C" int planted_past_the_tensor(const Planted* p, void* stream) {
  return accel::launch(past_the_tensor, dim3(unsigned(p->n / 32 + 1)), dim3(32), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_misaligned_vector(const Planted* p, void* stream) {
  return accel::launch(misaligned_vector, dim3(1), dim3(unsigned(p->n / 4)), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_nan_index(const Planted* p, void* stream) {
  return accel::launch(nan_index, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
