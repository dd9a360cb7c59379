// torch ops accel_native::ps_roi_pool_{forward,backward}. accel/ops/boxes/ps_roi_pool.py is the only caller and the place
// where the op is defined. The sums are those of ps_roi_align, with weights of 1.

#include "cpu/boxes/ps_roi_align/run.h"

#include <algorithm>

namespace accel::ps_roi_pool {
namespace {

using namespace accel::ps_roi_align;

// The bins of one axis hold whole pixels. The last pixel is in none, as in torchvision.
void add_bins(float low, float high, int bins, int size, std::vector<Span>& spans, std::vector<float>& weights) {
  low = std::round(low);
  const float step = std::max(std::round(high) - low, 1.0f) / float(bins), last = float(size - 1);
  for (int i = 0; i < bins; ++i) {
    const float first = std::clamp(low + std::floor(float(i) * step), 0.0f, last);
    const float end = std::clamp(low + std::ceil(float(i + 1) * step), 0.0f, last);
    const int count = std::max(0, int(end) - int(first));
    spans.push_back({int(first), count, int64_t(weights.size()), float(std::max(count, 1))});
    weights.insert(weights.end(), size_t(count), 1.0f);
  }
}

Tensor forward(Tensor input, Tensor boxes, Ints bins, double scale) {
  return run_forward(make_plan(input, boxes, size_of(input), bins, scale, add_bins).p, input);
}

Tensor backward(Tensor grad_out, Tensor boxes, Ints size, Ints bins, double scale) {
  return run_backward(make_plan(grad_out, boxes, size, bins, scale, add_bins).p, grad_out);
}

}  // namespace
}  // namespace accel::ps_roi_pool

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def("ps_roi_pool_forward(Tensor input, Tensor boxes, int[] output_size, float spatial_scale) -> Tensor");
  m.def(
      "ps_roi_pool_backward(Tensor grad_out, Tensor boxes, int[] input_size, int[] output_size, float spatial_scale) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("ps_roi_pool_forward", TORCH_BOX(&accel::ps_roi_pool::forward));
  m.impl("ps_roi_pool_backward", TORCH_BOX(&accel::ps_roi_pool::backward));
}
