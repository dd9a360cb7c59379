// Warp collectives with the wrong mask or the wrong company; each right kernel writes its neighbour's number, lane
// xor 1.
#include "planted.h"

namespace {

// Planted: the mask names the lower half, the upper half calls as well.
__global__ void mask_without_caller(Planted p) {
  int i = int(threadIdx.x);
  unsigned mask = p.bug ? 0x0000ffffu : 0xffffffffu;
  p.out[i] = __shfl_xor_sync(mask, p.in[i], 1);
}

// Planted: the mask names all, half of them never come.
__global__ void mask_of_absent_lanes(Planted p) {
  int i = int(threadIdx.x), value = p.in[i], other;
  if (p.bug && i % 32 < 16)
    other = value;
  else
    other = __shfl_xor_sync(0xffffffffu, value, 1);
  p.out[i] = other;
}

// Planted: lanes of one call hand over different masks.
__global__ void masks_that_differ(Planted p) {
  int i = int(threadIdx.x);
  unsigned mask = p.bug && i % 2 ? 0x7fffffffu : 0xffffffffu;
  p.out[i] = __shfl_xor_sync(i == 31 ? 0xffffffffu : mask, p.in[i], 1);
}

// Planted: the value is read from a lane that does not take part.
__global__ void read_outside_the_mask(Planted p) {
  int i = int(threadIdx.x), value = p.in[i];
  int other = __shfl_xor_sync(0xffffffffu, value, 1);
  if (p.bug && i < 8) other = __shfl_sync(0x000000ffu, value, i + 8);
  p.out[i] = other;
}

// Planted: a full mask in a warp whose last lanes do not exist.
__global__ void mask_past_the_block(Planted p) {
  int i = int(threadIdx.x);
  unsigned mask = p.bug ? 0xffffffffu : 0xffffffffu >> (32 - blockDim.x);
  p.out[i] = __shfl_xor_sync(mask, p.in[i], 1);
}

}  // namespace

extern "C" int planted_mask_without_caller(const Planted* p, void* stream) {
  return accel::launch(mask_without_caller, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_mask_of_absent_lanes(const Planted* p, void* stream) {
  return accel::launch(mask_of_absent_lanes, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_masks_that_differ(const Planted* p, void* stream) {
  return accel::launch(masks_that_differ, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_read_outside_the_mask(const Planted* p, void* stream) {
  return accel::launch(read_outside_the_mask, dim3(1), dim3(unsigned(p->n)), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_mask_past_the_block(const Planted* p, void* stream) {
  return accel::launch(mask_past_the_block, dim3(1), dim3(24), 0, cudaStream_t(stream), *p);
}
