// One 16 × 8 product of matrix fragments, in bfloat16 and half. in: a as 16 rows of 8 pairs, then b as 8 columns of 8
// pairs; out: floats of d. Planted: the upper half of the warp stays away.
#include "planted.h"

namespace {

template <class T>
__global__ void fragments(Planted p) {
  int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  auto pair = [&](int row, int column) { return uint32_t(p.in[row * 8 + column]); };
  uint32_t a[4] = {pair(g, t), pair(g + 8, t), pair(g, t + 4), pair(g + 8, t + 4)};
  uint32_t b[2] = {pair(16 + g, t), pair(16 + g, t + 4)};
  float d[4] = {1.f, 1.f, 1.f, 1.f};
  if (!p.bug || lane < 16) accel::mma_m16n8k16<T>(d, a, b);
  float* out = reinterpret_cast<float*>(p.out);
  for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = d[i];
}

}  // namespace

extern "C" int planted_fragments_bfloat16(const Planted* p, void* stream) {
  return accel::launch(fragments<__nv_bfloat16>, dim3(1), dim3(32), 0, cudaStream_t(stream), *p);
}
extern "C" int planted_fragments_float16(const Planted* p, void* stream) {
  return accel::launch(fragments<__half>, dim3(1), dim3(32), 0, cudaStream_t(stream), *p);
}
