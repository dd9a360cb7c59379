// The CUDA side of accel_native::ms_deform_attn_{forward,backward}, whose schemas stand beside the CPU's binding.
// accel/ops/deformable/ms_deform_attn.py is the only caller and the place where the op is defined.

#include "cuda/deformable/ms_deform_attn.h"

#include "cuda/_binding.h"

namespace accel::ms_deform_attn {
namespace {

MSDeformAttn describe(const Tensor& value, const Tensor& locations, const Tensor& weights, const Tensor& shapes,
                      const Tensor& starts, const Ints& num_points, bool border_gradient) {
  STD_TORCH_CHECK(value.dim() == 4 && locations.dim() == 5, "value must be 4-D and sampling_locations 5-D");
  const int64_t levels = int64_t(num_points.size());
  STD_TORCH_CHECK(levels <= ms_deform_attn_levels, "at most ", ms_deform_attn_levels, " levels, not ", levels);
  check_cuda(value, "value", value);
  check_cuda(shapes, "spatial_shapes", value, ScalarType::Long, 2 * levels);
  check_cuda(starts, "level_start_index", value, ScalarType::Long, levels);
  MSDeformAttn p{};
  p.batch = int32_of(value.size(0), "N"), p.pixels = int32_of(value.size(1), "S");
  p.heads = int32_of(value.size(2), "M"), p.channels = int32_of(value.size(3), "D");
  p.queries = int32_of(locations.size(1), "Q"), p.levels = int32_t(levels);
  p.dtype = dtype_of(value);
  p.border_gradient = border_gradient;
  int64_t points = 0;
  for (int64_t level = 0; level < levels; ++level) {
    p.num_points[level] = int32_of(num_points[size_t(level)], "num_points");
    points += p.num_points[level];
  }
  STD_TORCH_CHECK(locations.size(0) == p.batch && locations.size(2) == p.heads && locations.size(3) == points &&
                      locations.size(4) == 2,
                  "sampling_locations must be (N, Q, M, P, 2)");
  check_cuda(locations, "sampling_locations", value, ScalarType::Float, locations.numel());
  check_cuda(weights, "attention_weights", value, ScalarType::Float, locations.numel() / 2);
  p.value = value.const_data_ptr();
  p.locations = floats(locations);
  p.weights = floats(weights);
  p.shapes = static_cast<const int64_t*>(shapes.const_data_ptr());
  p.starts = static_cast<const int64_t*>(starts.const_data_ptr());
  return p;
}

Tensor forward(Tensor value, Tensor locations, Tensor weights, Tensor shapes, Tensor starts, Ints num_points,
               bool border_gradient) {
  const OnDevice device(value);
  locations = aligned_pairs(locations);
  MSDeformAttn p = describe(value, locations, weights, shapes, starts, num_points, border_gradient);
  Tensor out = torch::stable::new_empty(value, {p.batch, p.queries, int64_t{p.heads} * p.channels});
  p.out = out.mutable_data_ptr();
  check_launch(accel_ms_deform_attn_forward(&p, device.stream()), "ms_deform_attn");
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor value, Tensor locations, Tensor weights,
                                            Tensor shapes, Tensor starts, Ints num_points, bool border_gradient,
                                            Bools needs) {
  const OnDevice device(value);
  locations = aligned_pairs(locations);
  MSDeformAttn p = describe(value, locations, weights, shapes, starts, num_points, border_gradient);
  check_cuda(grad_out, "grad_out", value, value.scalar_type(), int64_t{p.batch} * p.queries * p.heads * p.channels);
  STD_TORCH_CHECK(needs.size() == 3, "needs must be three");
  Tensor grad_value = like(value, needs[0]), grad_locations = like(locations, needs[1]);
  Tensor grad_weights = like(weights, needs[2]);
  Tensor scratch = needs[0] ? scratch_for(value, accel_ms_deform_attn_scratch(&p), p.batch) : like(value, false);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_value = needs[0] ? grad_value.mutable_data_ptr() : nullptr;
  p.grad_locations = needs[1] ? mutable_floats(grad_locations) : nullptr;
  p.grad_weights = needs[2] ? mutable_floats(grad_weights) : nullptr;
  p.scratch = scratch.mutable_data_ptr();
  p.scratch_bytes = needs[0] ? scratch.numel() : 0;
  check_launch(accel_ms_deform_attn_backward(&p, device.stream()), "ms_deform_attn");
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace accel::ms_deform_attn

STABLE_TORCH_LIBRARY_IMPL(accel_native, ACCEL_KERNELS_ARE_ON, m) {
  m.impl("ms_deform_attn_forward", TORCH_BOX(&accel::ms_deform_attn::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&accel::ms_deform_attn::backward));
}
