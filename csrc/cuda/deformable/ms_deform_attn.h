// What the host hands to csrc/cuda/deformable/ms_deform_attn.cu. Every pointer is to device memory, every tensor contiguous.
#pragma once

#include <cstdint>

namespace accel {

constexpr int ms_deform_attn_levels = 16;  // at most

struct MSDeformAttn {
  const void* value;       // (N, S, M, D)
  const float* locations;  // (N, Q, M, P, 2), x before y
  const float* weights;    // (N, Q, M, P)
  const int64_t* shapes;   // (L, 2), height before width
  const int64_t* starts;   // (L)
  void* out;               // (N, Q, M·D); forward only

  const void* grad_out;  // as out; backward only, like all that follows
  void* grad_value;      // null: not wanted, here and below
  float* grad_locations;
  float* grad_weights;
  void* scratch;  // for grad_value, at a multiple of 256 bytes
  int64_t scratch_bytes;

  int32_t batch, pixels, queries, heads, channels, levels;  // N, S, Q, M, D, L
  int32_t dtype;                                            // of value, out and grad_out: 0 fp32, 1 bf16, 2 fp16
  int32_t border_gradient;                                  // 0: a pixel position of exactly −1 has none
  int32_t num_points[ms_deform_attn_levels];                // of each level, P in all
};

}  // namespace accel

extern "C" {
// 0, or a cudaError_t: cudaErrorInvalidValue for sizes that the kernels do not take.
int accel_ms_deform_attn_forward(const accel::MSDeformAttn* p, void* stream);
int accel_ms_deform_attn_backward(const accel::MSDeformAttn* p, void* stream);
// The least scratch memory that grad_value needs, for one image at a time; N times that does all at once.
int64_t accel_ms_deform_attn_scratch(const accel::MSDeformAttn* p);
}
