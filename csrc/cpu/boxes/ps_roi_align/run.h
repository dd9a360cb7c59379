// What the bindings of ps_roi_align and ps_roi_pool do alike: checks, boxes in pixels, threads. What a bin is on one
// axis is all that tells the ops apart. No product is fused with a sum here on x86, so that bins are torchvision's.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/_binding.h"
#include "params.h"

namespace accel::ps_roi_align {

constexpr float LIMIT = 1 << 22;  // pixels; accel/ops/boxes/bins.py says why

struct Plan {
  std::vector<int64_t> image;
  std::vector<Span> rows, columns;
  std::vector<float> weights;
  Params p{};
};

// The bins of boxes (K, 5) on maps of `size` (N, C, H, W). `axis(low, high, bins, size, spans, weights)` appends the
// bins of one box on one axis.
template <typename Axis>
Plan make_plan(const Tensor& x, const Tensor& boxes, const Ints& size, const Ints& bins, double spatial_scale,
               const Axis& axis) {
  STD_TORCH_CHECK(size.size() == 4 && bins.size() == 2, "a map has four sizes, and bins have two");
  Plan plan;
  Params& p = plan.p;
  p.batch = size[0], p.channels = size[1], p.height = size[2], p.width = size[3];
  constexpr int64_t MOST = int64_t(1) << 30;
  STD_TORCH_CHECK(p.batch >= 0 && p.channels > 0 && p.height > 0 && p.width > 0 && p.height <= LIMIT &&
                      p.width <= LIMIT && p.height * p.width <= MOST && p.channels <= MOST,
                  "a map must have channels and pixels, at most 2^30 of either and 2^22 along a side");
  STD_TORCH_CHECK(bins[0] > 0 && bins[1] > 0 && bins[0] <= p.channels && bins[1] <= p.channels &&
                      p.channels % (bins[0] * bins[1]) == 0,
                  p.channels, " channels are no multiple of ", bins[0], " x ", bins[1], " bins");
  p.bins_y = int(bins[0]), p.bins_x = int(bins[1]);
  p.dtype = dtype_of(x, "bins are made of");
  STD_TORCH_CHECK(boxes.dim() == 2, "boxes must be (K, 5)");
  p.boxes = boxes.size(0);
  check_f32(boxes, "boxes", p.boxes * 5);
  const float* box = static_cast<const float*>(boxes.const_data_ptr());
  const float scale = float(spatial_scale);
  for (int64_t k = 0; k < p.boxes; ++k, box += 5) {
    STD_TORCH_CHECK(box[0] > -1.0f && box[0] < float(p.batch), "box ", k, " of boxes is of image ", box[0],
                    ", and input has a batch of ", p.batch);
    float at[4];
    bool real = true;
    for (int i = 0; i < 4; ++i) {
      at[i] = box[1 + i] * scale;
      real &= std::fabs(at[i]) < LIMIT;  // false for NaN
    }
    plan.image.push_back(real ? int64_t(box[0]) : -1);
    if (!real) at[0] = at[1] = at[2] = at[3] = 0.0f;
    axis(at[1], at[3], p.bins_y, int(p.height), plan.rows, plan.weights);
    axis(at[0], at[2], p.bins_x, int(p.width), plan.columns, plan.weights);
  }
  plan.weights.resize(plan.weights.size() + PADDING);
  p.image = plan.image.data(), p.rows = plan.rows.data(), p.columns = plan.columns.data();
  p.weights = plan.weights.data();
  return plan;
}

inline Ints size_of(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() == 4, "input must be (N, C, H, W)");
  return {input.size(0), input.size(1), input.size(2), input.size(3)};
}

inline Tensor run_forward(const Params& p, const Tensor& input) {
  check_cpu(input, "input");
  Tensor out = torch::stable::new_empty(input, {p.boxes, p.channels / (p.bins_y * p.bins_x), p.bins_y, p.bins_x});
  const Forward f{p, input.const_data_ptr(), out.mutable_data_ptr()};
  const auto run = ACCEL_LEVEL(bins::gather_bins);
  torch::stable::parallel_for(0, p.boxes, 1, [&](int64_t from, int64_t to) { run(f, from, to); });
  return out;
}

inline Tensor run_backward(const Params& p, const Tensor& grad_out) {
  check_cpu(grad_out, "grad_out");
  STD_TORCH_CHECK(grad_out.numel() == p.boxes * p.channels, "grad_out must have the shape of the output");
  Tensor grad_input = torch::stable::new_empty(grad_out, {p.batch, p.channels, p.height, p.width});
  const Backward b{p, grad_out.const_data_ptr(), grad_input.mutable_data_ptr()};
  const auto run = ACCEL_LEVEL(bins::spread_bins);
  torch::stable::parallel_for(0, p.batch * p.channels, 1, [&](int64_t from, int64_t to) { run(b, from, to); });
  return grad_input;
}

}  // namespace accel::ps_roi_align
