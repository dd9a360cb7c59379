// The CUDA side of accel_native::deform_attention2d_{forward,backward}, whose schemas stand beside the CPU's binding.
// accel/ops/deformable/deform_attention2d.py is the only caller and the place where the op is defined.

#include "cuda/deformable/deform_attention2d.h"

#include "cuda/_binding.h"

namespace accel::deform_attention2d {
namespace {

constexpr int64_t most = int64_t{1} << 30;  // of a padded line: positions on it are 32-bit integers

DeformAttention2d describe(const Tensor& input, const Tensor& offset, const Tensor& mask, const Ints& kernel,
                           const Ints& stride, const Ints& padding, const Ints& dilation, double offset_scale,
                           bool remove_center, bool softmax) {
  STD_TORCH_CHECK(input.dim() == 4 && offset.dim() == 6, "input must be 4-D and offset 6-D");
  check_cuda(input, "input", input);
  DeformAttention2d p{};
  for (const Ints* pair : {&kernel, &stride, &padding, &dilation})
    STD_TORCH_CHECK(pair->size() == 2, "kernel_size, stride, padding and dilation are pairs");
  p.batch = int32_of(input.size(0), "N"), p.height = int32_of(input.size(1), "H");
  p.width = int32_of(input.size(2), "W"), p.channels = int32_of(input.size(3), "C");
  p.out_height = int32_of(offset.size(1), "Ho"), p.out_width = int32_of(offset.size(2), "Wo");
  p.groups = int32_of(offset.size(3), "G"), p.taps = int32_of(offset.size(4), "K");
  for (size_t i = 0; i < 2; ++i) {
    p.kernel[i] = int32_of(kernel[i], "kernel_size"), p.stride[i] = int32_of(stride[i], "stride");
    p.padding[i] = int32_of(padding[i], "padding"), p.dilation[i] = int32_of(dilation[i], "dilation");
    const int64_t size = i ? p.width : p.height, out = i ? p.out_width : p.out_height, line = size + 2 * padding[i];
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0 && line < most &&
                        (out - 1) * stride[i] + dilation[i] * (kernel[i] - 1) < line,
                    "the windows of ", out, " outputs do not fit into a line of ", size);
  }
  STD_TORCH_CHECK(offset.size(0) == p.batch && p.taps == kernel[0] * kernel[1] - remove_center && offset.size(5) == 2,
                  "offset must be (N, Ho, Wo, G, K, 2)");
  check_cuda(offset, "offset", input, ScalarType::Float, offset.numel());
  check_cuda(mask, "mask", input, ScalarType::Float, offset.numel() / 2);
  p.dtype = dtype_of(input);
  p.remove_center = remove_center, p.softmax = softmax;
  p.offset_scale = float(offset_scale);
  p.input = input.const_data_ptr();
  p.offset = floats(offset);
  p.mask = floats(mask);
  return p;
}

Tensor forward(Tensor input, Tensor offset, Tensor mask, Ints kernel, Ints stride, Ints padding, Ints dilation,
               double offset_scale, bool remove_center, bool softmax) {
  const OnDevice device(input);
  offset = aligned_pairs(offset);
  DeformAttention2d p =
      describe(input, offset, mask, kernel, stride, padding, dilation, offset_scale, remove_center, softmax);
  Tensor out = torch::stable::new_empty(input, {p.batch, p.out_height, p.out_width, p.channels});
  p.out = out.mutable_data_ptr();
  check_launch(accel_deform_attention2d_forward(&p, device.stream()), "deform_attention2d");
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor input, Tensor offset, Tensor mask, Ints kernel,
                                            Ints stride, Ints padding, Ints dilation, double offset_scale,
                                            bool remove_center, bool softmax, Bools needs) {
  const OnDevice device(input);
  offset = aligned_pairs(offset);
  DeformAttention2d p =
      describe(input, offset, mask, kernel, stride, padding, dilation, offset_scale, remove_center, softmax);
  check_cuda(grad_out, "grad_out", input, input.scalar_type(),
             int64_t{p.batch} * p.out_height * p.out_width * p.channels);
  STD_TORCH_CHECK(needs.size() == 3, "needs must be three");
  Tensor grad_input = like(input, needs[0]), grad_offset = like(offset, needs[1]), grad_mask = like(mask, needs[2]);
  Tensor scratch = needs[0] ? scratch_for(input, accel_deform_attention2d_scratch(&p), p.batch) : like(input, false);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_input = needs[0] ? grad_input.mutable_data_ptr() : nullptr;
  p.grad_offset = needs[1] ? mutable_floats(grad_offset) : nullptr;
  p.grad_mask = needs[2] ? mutable_floats(grad_mask) : nullptr;
  p.scratch = scratch.mutable_data_ptr();
  p.scratch_bytes = needs[0] ? scratch.numel() : 0;
  check_launch(accel_deform_attention2d_backward(&p, device.stream()), "deform_attention2d");
  return {grad_input, grad_offset, grad_mask};
}

}  // namespace
}  // namespace accel::deform_attention2d

STABLE_TORCH_LIBRARY_IMPL(accel_native, ACCEL_KERNELS_ARE_ON, m) {
  m.impl("deform_attention2d_forward", TORCH_BOX(&accel::deform_attention2d::forward));
  m.impl("deform_attention2d_backward", TORCH_BOX(&accel::deform_attention2d::backward));
}
