// What the host hands to csrc/cuda/deformable/conv_forward.cu. Every pointer is to device memory, every tensor contiguous.
#pragma once

#include <cstdint>

namespace accel {

struct DeformConv2dForward {
  const void* input;    // (N, H, W, C)
  const float* offset;  // (N, 2·G·K, Ho, Wo): y of tap k at 2k of its group, then x
  const float* mask;    // (N, G·K, Ho, Wo); null: 1
  const void* weight;   // (O, C/g, kh, kw)
  const float* bias;    // (O); null: 0

  void* out;     // (N, O, Ho, Wo), or (N, Ho, Wo, O) if `last`
  void* packed;  // scratch for the weight, at a multiple of 16 bytes

  int32_t batch, height, width, channels, out_channels, out_height, out_width;  // N, H, W, C, O, Ho, Wo
  int32_t groups, offset_groups;                                                // g, G
  int32_t dtype, last;                                                          // of all void*: 1 bf16, 2 fp16
  int32_t kernel[2], stride[2], padding[2], dilation[2];                        // y, x
  int32_t processors, shared;  // of the device: multiprocessors, bytes of shared memory that a block may have
  int32_t tile;                // 0, or 1 to 5 to have just that one
};

}  // namespace accel

extern "C" {
// 0, or a cudaError_t: cudaErrorInvalidValue for sizes that the kernel does not take. The tile that a call gets follows
// from its sizes and the device, and does not change what a sum adds in what order.
int accel_deform_conv2d_forward(const accel::DeformConv2dForward* p, void* stream);
// Elements of `packed`, -1 for sizes that the kernel does not take.
int64_t accel_deform_conv2d_packed(const accel::DeformConv2dForward* p);
}
