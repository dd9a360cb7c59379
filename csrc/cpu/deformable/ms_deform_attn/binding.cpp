// torch ops accel_native::ms_deform_attn_{forward,backward}. accel/ops/deformable/ms_deform_attn.py is the only caller and the place
// where the op is defined.

#include "run.h"

namespace accel::ms_deform_attn {
namespace {

struct Call {
  std::vector<Point> point;  // what p.point points into
  Params p{};
};

// A level that is not within the map has no pixel: nobody may have checked the shapes.
void place_level(int64_t height, int64_t width, int64_t start, int64_t pixels, Point& point) {
  if (height <= 0 || width <= 0 || height > pixels || width > pixels) return;
  if (start < 0 || start > pixels || height * width > pixels - start) return;
  point.height = int32_t(height), point.width = int32_t(width), point.start = int32_t(start);
}

Call describe(const Tensor& value, const Tensor& locations, const Tensor& weights, const Tensor& shapes,
              const Tensor& starts, const Ints& num_points, bool border_gradient) {
  STD_TORCH_CHECK(value.dim() == 4 && locations.dim() == 5, "value must be 4-D and sampling_locations 5-D");
  const int64_t levels = int64_t(num_points.size()), pixels = value.size(1);
  check_cpu(shapes, "spatial_shapes");
  check_cpu(starts, "level_start_index");
  STD_TORCH_CHECK(shapes.scalar_type() == ScalarType::Long && starts.scalar_type() == ScalarType::Long &&
                      shapes.numel() == 2 * levels && starts.numel() == levels,
                  "spatial_shapes must be (L, 2) and level_start_index (L,) in int64 for the L of num_points");
  const int64_t* size = static_cast<const int64_t*>(shapes.const_data_ptr());
  const int64_t* start = static_cast<const int64_t*>(starts.const_data_ptr());
  STD_TORCH_CHECK(pixels < int64_t(1) << 31, "a map of 2^31 pixels");
  Call call;
  for (int64_t level = 0; level < levels; ++level) {
    Point point{};
    place_level(size[2 * level], size[2 * level + 1], start[level], pixels, point);
    point.scale_y = float(point.height), point.scale_x = float(point.width);
    STD_TORCH_CHECK(num_points[level] >= 0 && num_points[level] <= 1 << 20, "num_points must be 0 to 2^20");
    call.point.insert(call.point.end(), size_t(num_points[level]), point);
  }
  STD_TORCH_CHECK(locations.size(0) == value.size(0) && locations.size(2) == value.size(2) &&
                      locations.size(3) == int64_t(call.point.size()) && locations.size(4) == 2,
                  "sampling_locations must be (N, Q, M, P, 2)");
  call.p = describe(value, locations, weights, value.size(0), pixels, value.size(2), value.size(3), locations.size(1),
                    call.point);
  call.p.first_y = call.p.first_x = -0.5f;
  call.p.border_gradient = border_gradient;
  return call;
}

Tensor forward(Tensor value, Tensor locations, Tensor weights, Tensor shapes, Tensor starts, Ints num_points,
               bool border_gradient) {
  const Call call = describe(value, locations, weights, shapes, starts, num_points, border_gradient);
  const Params& p = call.p;
  return run_forward(p, value, {p.batch, p.queries, p.heads * p.channels});
}

Grads backward(Tensor grad_out, Tensor value, Tensor locations, Tensor weights, Tensor shapes, Tensor starts,
               Ints num_points, bool border_gradient, Bools needs) {
  const Call call = describe(value, locations, weights, shapes, starts, num_points, border_gradient);
  return run_backward(call.p, grad_out, value, locations, weights, needs);
}

}  // namespace
}  // namespace accel::ms_deform_attn

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def(
      "ms_deform_attn_forward(Tensor value, Tensor sampling_locations, Tensor attention_weights, Tensor spatial_shapes, "
      "Tensor level_start_index, int[] num_points, bool border_gradient) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_out, Tensor value, Tensor sampling_locations, Tensor attention_weights, "
      "Tensor spatial_shapes, Tensor level_start_index, int[] num_points, bool border_gradient, bool[] needs) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("ms_deform_attn_forward", TORCH_BOX(&accel::ms_deform_attn::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&accel::ms_deform_attn::backward));
}
