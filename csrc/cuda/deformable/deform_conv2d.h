// What the host hands to csrc/cuda/deformable/deform_conv2d.cu: the parts of the backward that gather and scatter. A product of
// grad_out and the weight made `columns` before; another with what they are afterwards gives the weight's gradient.
// Every pointer is to device memory, every tensor contiguous.
#pragma once

#include <cstdint>

namespace accel {

struct DeformConv2d {
  void* columns;         // (N, Ho·Wo, K, C), the gradients of the sampled values
  const void* input;     // (N, H, W, C); not read if only grad_input is wanted
  const float* offset;   // (N, 2·G·K, Ho, Wo): y of tap k at 2k of its group, then x
  const float* mask;     // (N, G·K, Ho, Wo); null: 1

  void* grad_input;    // (N, H, W, C); null: not wanted, here and below
  float* grad_offset;  // as offset
  float* grad_mask;    // as mask
  void* scratch;       // for grad_input, at a multiple of 256 bytes
  int64_t scratch_bytes;

  int32_t batch, height, width, channels, out_height, out_width, groups;  // N, H, W, C, Ho, Wo, G offset groups
  int32_t dtype;                                                          // of all void*: 0 fp32, 1 bf16, 2 fp16
  int32_t sample;  // 1: leave in `columns` the sampled values times the mask, in place of their gradients
  int32_t border_gradient;  // 1: a position at exactly −1 has the gradient from the right, 0: none
  int32_t kernel[2], stride[2], padding[2], dilation[2];                  // y, x
};

}  // namespace accel

extern "C" {
// 0, or a cudaError_t: cudaErrorInvalidValue for sizes that the kernels do not take. Images are independent: a caller
// that has no room for all columns calls with a few images at a time.
int accel_deform_conv2d_backward(const accel::DeformConv2d* p, void* stream);
// The least scratch memory that grad_input needs, for one image at a time; N times that does all at once.
int64_t accel_deform_conv2d_scratch(const accel::DeformConv2d* p);
}
