// torch ops accel_native::ps_roi_align_{forward,backward}. accel/ops/boxes/ps_roi_align.py is the only caller and the place
// where the op is defined.

#include "run.h"

#include <algorithm>

namespace accel::ps_roi_align {
namespace {

constexpr float SLACK = 16.0f;  // samples beside those near the map; accel/ops/boxes/bins.py says why

// A position that is less than a pixel outside of the map is moved to the border, one further out is none.
bool move_into(float& at, int size) {
  if (!(at >= -1.0f && at <= float(size))) return false;
  at = std::clamp(at, 0.0f, float(size - 1));
  return true;
}

// Bins of one axis, with `ratio` samples each, or, if that is 0, as many as the bin has pixels, rounded up.
struct Samples {
  int64_t ratio;

  void operator()(float low, float high, int bins, int size, std::vector<Span>& spans,
                  std::vector<float>& weights) const {
    low -= 0.5f;
    const float step = (high - 0.5f - low) / float(bins);
    const float grid = ratio ? float(ratio) : std::max(std::ceil(step), 0.0f);
    for (int i = 0; i < bins; ++i) {
      const float begin = float(i) * step + low;
      float first = 0.0f, end = grid;
      if (!ratio && grid > 0.0f) {  // in long bins only the samples near the map are looked at
        first = std::clamp(std::floor((-1.0f - begin) * grid / step - SLACK), 0.0f, grid);
        end = std::min(grid, first + 2.0f * float(size) + 2.0f + 2.0f * SLACK);
      }
      add_bin(begin, step, grid, first, end, size, spans, weights);
    }
  }

 private:
  static void add_bin(float begin, float step, float grid, float first, float end, int size, std::vector<Span>& spans,
                      std::vector<float>& weights) {
    const auto position = [&](float t) { return begin + (t + 0.5f) * step / grid; };
    int lowest = size, highest = -1;
    for (float t = first; t < end; ++t) {
      float at = position(t);
      if (!move_into(at, size)) continue;
      lowest = std::min(lowest, int(at)), highest = std::max(highest, std::min(int(at) + 1, size - 1));
    }
    const int count = std::max(0, highest - lowest + 1);
    spans.push_back({count ? lowest : 0, count, int64_t(weights.size()), std::max(grid, 1.0f)});
    weights.resize(weights.size() + size_t(count));
    float* to = weights.data() + spans.back().weights;
    for (float t = first; t < end; ++t) {
      float at = position(t);
      if (!move_into(at, size)) continue;
      const int pixel = int(at);
      const float past = at - float(pixel);
      to[pixel - lowest] += 1.0f - past;
      to[std::min(pixel + 1, size - 1) - lowest] += past;
    }
  }
};

Plan describe(const Tensor& x, const Tensor& boxes, const Ints& size, const Ints& bins, double scale, int64_t ratio) {
  STD_TORCH_CHECK(ratio >= 0 && ratio <= 4096, "sampling_ratio must be 0 to 4096");
  return make_plan(x, boxes, size, bins, scale, Samples{ratio});
}

Tensor forward(Tensor input, Tensor boxes, Ints bins, double scale, int64_t ratio) {
  return run_forward(describe(input, boxes, size_of(input), bins, scale, ratio).p, input);
}

Tensor backward(Tensor grad_out, Tensor boxes, Ints size, Ints bins, double scale, int64_t ratio) {
  return run_backward(describe(grad_out, boxes, size, bins, scale, ratio).p, grad_out);
}

}  // namespace
}  // namespace accel::ps_roi_align

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def(
      "ps_roi_align_forward(Tensor input, Tensor boxes, int[] output_size, float spatial_scale, int sampling_ratio) "
      "-> Tensor");
  m.def(
      "ps_roi_align_backward(Tensor grad_out, Tensor boxes, int[] input_size, int[] output_size, float spatial_scale, "
      "int sampling_ratio) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("ps_roi_align_forward", TORCH_BOX(&accel::ps_roi_align::forward));
  m.impl("ps_roi_align_backward", TORCH_BOX(&accel::ps_roi_align::backward));
}
