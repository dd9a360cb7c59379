// What the host hands to csrc/cuda/deformable/deform_attention2d.cu. Every pointer is to device memory, every tensor contiguous.
#pragma once

#include <cstdint>

namespace accel {

struct DeformAttention2d {
  const void* input;    // (N, H, W, C)
  const float* offset;  // (N, Ho, Wo, G, K, 2), x before y
  const float* mask;    // (N, Ho, Wo, G, K)
  void* out;            // (N, Ho, Wo, C); forward only

  const void* grad_out;  // as out; backward only, like all that follows
  void* grad_input;      // null: not wanted, here and below
  float* grad_offset;
  float* grad_mask;
  void* scratch;     // for grad_input, at a multiple of 256 bytes
  int64_t scratch_bytes;

  int32_t batch, height, width, channels, out_height, out_width, groups, taps;  // N, H, W, C, Ho, Wo, G, K
  int32_t dtype;                                                                // of input, out: 0 fp32, 1 bf16, 2 fp16
  int32_t kernel[2], stride[2], padding[2], dilation[2];                        // y, x
  int32_t remove_center, softmax;                                               // 0 or 1
  float offset_scale;
};

}  // namespace accel

extern "C" {
// 0, or a cudaError_t: cudaErrorInvalidValue for sizes that the kernels do not take.
int accel_deform_attention2d_forward(const accel::DeformAttention2d* p, void* stream);
int accel_deform_attention2d_backward(const accel::DeformAttention2d* p, void* stream);
// The least scratch memory that grad_input needs, for one image at a time; N times that does all at once.
int64_t accel_deform_attention2d_scratch(const accel::DeformAttention2d* p);
}
