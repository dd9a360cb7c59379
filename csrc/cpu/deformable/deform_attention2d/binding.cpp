// torch ops accel_native::deform_attention2d_{forward,backward}. accel/ops/deformable/deform_attention2d.py is the only caller and
// the place where the op is defined. The sums are those of ms_deform_attn, on one level, with a base that follows the
// output: the groups are its heads and the taps its points.

#include "cpu/deformable/ms_deform_attn/run.h"

namespace accel::deform_attention2d {
namespace {

using namespace accel::ms_deform_attn;

struct Call {
  std::vector<Point> point;  // what p.point points into
  Params p{};
};

// An integer small enough that no product of two of them leaves int64.
void check_pair(const Ints& x, const char* name, int64_t least) {
  STD_TORCH_CHECK(x.size() == 2 && x[0] >= least && x[1] >= least && std::max(x[0], x[1]) < int64_t(1) << 30, name,
                  " must be two integers from ", least, " to 2^30");
}

Call describe(const Tensor& input, const Tensor& offset, const Tensor& mask, const Ints& kernel, const Ints& stride,
              const Ints& padding, const Ints& dilation, double offset_scale, bool remove_center, bool softmax) {
  STD_TORCH_CHECK(input.dim() == 4 && offset.dim() == 6, "input must be 4-D and offset 6-D");
  check_pair(kernel, "kernel_size", 1);
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
  const int64_t height = input.size(1), width = input.size(2), groups = offset.size(3);
  const int64_t taps = kernel[0] * kernel[1], count = taps - remove_center;
  STD_TORCH_CHECK(height < int64_t(1) << 31 && width < int64_t(1) << 31 && taps <= 1 << 20,
                  "a map of 2^31 pixels in a line, or a kernel of more than 2^20 taps");
  STD_TORCH_CHECK(offset.size(0) == input.size(0) && offset.size(4) == count && offset.size(5) == 2,
                  "offset must be (N, Ho, Wo, G, K, 2)");
  STD_TORCH_CHECK(groups > 0 && input.size(3) % groups == 0, "the groups must divide the channels");
  const int64_t middle_y = dilation[0] * (kernel[0] - 1) / 2, middle_x = dilation[1] * (kernel[1] - 1) / 2;
  const float scale = float(offset_scale);
  Call call;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t tap = i + (remove_center && i >= count / 2);
    Point point{};
    point.place_y = float(tap % kernel[0] * dilation[0] - middle_y) * scale;
    point.place_x = float(tap / kernel[0] * dilation[1] - middle_x) * scale;
    point.scale_y = point.scale_x = scale;
    point.height = int32_t(height), point.width = int32_t(width);
    call.point.push_back(point);
  }
  Params& p = call.p;
  p = ms_deform_attn::describe(input, offset, mask, input.size(0), height * width, groups, input.size(3) / groups,
                               offset.size(1) * offset.size(2), call.point);
  p.softmax = softmax;
  p.line = std::max<int64_t>(1, offset.size(2));
  p.first_y = float(middle_y - padding[0]), p.first_x = float(middle_x - padding[1]);
  p.step_y = float(stride[0]), p.step_x = float(stride[1]);
  return call;
}

Tensor forward(Tensor input, Tensor offset, Tensor mask, Ints kernel, Ints stride, Ints padding, Ints dilation,
               double offset_scale, bool remove_center, bool softmax) {
  const Call call =
      describe(input, offset, mask, kernel, stride, padding, dilation, offset_scale, remove_center, softmax);
  return run_forward(call.p, input, {input.size(0), offset.size(1), offset.size(2), input.size(3)});
}

Grads backward(Tensor grad_out, Tensor input, Tensor offset, Tensor mask, Ints kernel, Ints stride, Ints padding,
               Ints dilation, double offset_scale, bool remove_center, bool softmax, Bools needs) {
  const Call call =
      describe(input, offset, mask, kernel, stride, padding, dilation, offset_scale, remove_center, softmax);
  return run_backward(call.p, grad_out, input, offset, mask, needs);
}

}  // namespace
}  // namespace accel::deform_attention2d

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def(
      "deform_attention2d_forward(Tensor input, Tensor offset, Tensor mask, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, float offset_scale, bool remove_center, bool softmax) -> Tensor");
  m.def(
      "deform_attention2d_backward(Tensor grad_out, Tensor input, Tensor offset, Tensor mask, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, float offset_scale, bool remove_center, bool softmax, "
      "bool[] needs) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("deform_attention2d_forward", TORCH_BOX(&accel::deform_attention2d::forward));
  m.impl("deform_attention2d_backward", TORCH_BOX(&accel::deform_attention2d::backward));
}
