// Multi-scale deformable attention: every query and head sums points of all levels (_points.cuh).

#include "cuda/deformable/ms_deform_attn.h"

#include "cuda/deformable/points.cuh"

namespace accel {
namespace {

struct Source {
  Rows n;
  Maps maps;
  int first[max_levels];  // point of each level
  bool border_gradient;
  const float* locations;
  const float* weights;
  float* grad_locations;
  float* grad_weights;

  __device__ float2 begin_row(int64_t, int, int) const { return make_float2(0.f, 0.f); }

  __device__ Point point(int64_t row, int k, float2) const {
    int level = 0;
    while (level + 1 < maps.levels && k >= first[level + 1]) ++level;
    Map map = read_map(maps, level);
    int64_t at = row * n.points + k;
    float2 location = __ldg(reinterpret_cast<const float2*>(locations) + at);
    float height = float(map.height), width = float(map.width);
    float y = location.y * height - 0.5f, x = location.x * width - 0.5f;
    float moves = border_gradient || (y > -1.f && x > -1.f) ? 1.f : 0.f;
    return {y, x, __ldg(weights + at), moves * height, moves * width, level, map};
  }

  __device__ void write(int64_t row, int k, float y, float x, float weight) const {
    int64_t at = row * n.points + k;
    if (grad_locations) reinterpret_cast<float2*>(grad_locations)[at] = make_float2(x, y);
    if (grad_weights) grad_weights[at] = weight;
  }
};

bool read(const MSDeformAttn& p, Source& s) {
  if (p.levels < 1 || p.levels > max_levels) return false;
  int64_t points = 0;
  for (int level = 0; level < p.levels; ++level) {
    s.first[level] = int(points);
    points += p.num_points[level];
    if (p.num_points[level] < 0 || points > int_most) return false;
  }
  s.n = {p.batch, p.queries, p.heads, p.channels, p.pixels, int(points)};
  s.maps = {p.levels, p.pixels, {}, p.shapes, p.starts};
  s.border_gradient = p.border_gradient;
  s.locations = p.locations;
  s.weights = p.weights;
  s.grad_locations = p.grad_locations;
  s.grad_weights = p.grad_weights;
  return rows_fit(s.n);
}

template <class T>
cudaError_t backward(const MSDeformAttn& p, const Source& source, cudaStream_t stream) {
  auto* grad_out = static_cast<const T*>(p.grad_out);
  cudaError_t error = cudaSuccess;
  if (p.grad_locations || p.grad_weights) {
    GradRows strides{int64_t{p.heads} * p.channels, 0};
    error = grad_points(source, static_cast<const T*>(p.value), grad_out, strides, stream);
  }
  if (error == cudaSuccess && p.grad_value)
    error = grad_map(source, source.maps, grad_out, static_cast<T*>(p.grad_value), p.scratch, p.scratch_bytes, stream);
  return error;
}

}  // namespace
}  // namespace accel

extern "C" int accel_ms_deform_attn_forward(const accel::MSDeformAttn* p, void* stream) {
  accel::Source source;
  if (!accel::read(*p, source)) return cudaErrorInvalidValue;
  return accel::by_dtype(p->dtype, [&](auto of) {
    using T = decltype(of);
    return accel::sum_samples(source, static_cast<const T*>(p->value), static_cast<T*>(p->out), cudaStream_t(stream));
  });
}

extern "C" int accel_ms_deform_attn_backward(const accel::MSDeformAttn* p, void* stream) {
  accel::Source source;
  if (!accel::read(*p, source)) return cudaErrorInvalidValue;
  return accel::by_dtype(p->dtype, [&](auto of) {
    return accel::backward<decltype(of)>(*p, source, cudaStream_t(stream));
  });
}

extern "C" int64_t accel_ms_deform_attn_scratch(const accel::MSDeformAttn* p) {
  accel::Source source;
  if (!accel::read(*p, source)) return -1;
  return accel::transpose_scratch(p->heads, p->queries * source.n.points, p->pixels);
}
