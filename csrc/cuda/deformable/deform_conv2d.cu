// Deformable convolution, backward: what the columns' gradients mean for offsets, mask (_points.cuh) and input
// (_transpose.cuh). To both a tap of an output and an offset group is a point.

#include "cuda/deformable/deform_conv2d.h"

#include "cuda/deformable/points.cuh"

namespace accel {
namespace {

struct Axis {
  int stride, padding, dilation;

  __device__ float at(int out, int tap) const { return float(out * stride - padding + tap * dilation); }
};

struct Source {
  Rows n;
  Maps maps;
  Axis y_axis, x_axis;
  int out_width, kernel_width;
  bool border_gradient;
  const float* offset;
  const float* mask;
  float* grad_offset;
  float* grad_mask;

  __device__ float2 begin_row(int64_t, int, int) const { return make_float2(0.f, 0.f); }

  // Plane of tap k of the row's image and group, among (N, G·K); the output's place in it.
  __device__ int64_t plane(int64_t row, int k, int& output) const {
    int64_t query = row / n.heads, image = query / n.queries;
    output = int(query - image * n.queries);
    return (image * n.heads + row % n.heads) * n.points + k;
  }

  __device__ Point point(int64_t row, int k, float2) const {
    int output;
    int64_t of = plane(row, k, output), at = of * n.queries + output;
    int i = output / out_width, line = k / kernel_width;
    const float* shift = offset + of * n.queries + at;  // plane 2·of
    float y = y_axis.at(i, line) + __ldg(shift);
    float x = x_axis.at(output - i * out_width, k - line * kernel_width) + __ldg(shift + n.queries);
    float moves = border_gradient || (y > -1.f && x > -1.f) ? 1.f : 0.f;
    return {y, x, mask ? __ldg(mask + at) : 1.f, moves, moves, 0, maps.only};
  }

  __device__ void write(int64_t row, int k, float y, float x, float weight) const {
    int output;
    int64_t of = plane(row, k, output), at = of * n.queries + output;
    if (grad_offset) {
      grad_offset[of * n.queries + at] = y;
      grad_offset[of * n.queries + at + n.queries] = x;
    }
    if (grad_mask) grad_mask[at] = weight;
  }
};

// Samples in the order of the offset planes, tap by tap; each sends a row of its own.
struct Columns {
  Source source;
  int first;  // image

  __device__ Sample operator()(int image, int group, int i) const {
    const Rows& n = source.n;
    int k = i / n.queries, output = i - k * n.queries;
    int64_t row = ((int64_t{first} + image) * n.queries + output) * n.heads + group;
    Point p = source.point(row, k, make_float2(0.f, 0.f));
    return {p.y, p.x, p.weight, 0, output * n.points + k};
  }
};

bool read(const DeformConv2d& p, Source& s) {
  int64_t outputs = int64_t{p.out_height} * p.out_width, pixels = int64_t{p.height} * p.width;
  int64_t taps = int64_t{p.kernel[0]} * p.kernel[1];
  if (p.height < 1 || p.width < 1 || p.out_height < 1 || p.out_width < 1 || outputs > int_most || pixels > int_most)
    return false;
  if (p.kernel[0] < 1 || p.kernel[1] < 1 || taps > int_most || p.groups < 1 || p.channels % p.groups) return false;
  if (outputs * taps >= (1 << (31 - level_bits))) return false;  // the number of a row of columns beside its level
  s.n = {p.batch, int(outputs), p.groups, p.channels / p.groups, int(pixels), int(taps)};
  s.maps = {1, int(pixels), {p.height, p.width, 0}, nullptr, nullptr};
  s.y_axis = {p.stride[0], p.padding[0], p.dilation[0]};
  s.x_axis = {p.stride[1], p.padding[1], p.dilation[1]};
  s.out_width = p.out_width;
  s.kernel_width = p.kernel[1];
  s.border_gradient = p.border_gradient;
  s.offset = p.offset;
  s.mask = p.mask;
  s.grad_offset = p.grad_offset;
  s.grad_mask = p.grad_mask;
  return rows_fit(s.n);
}

template <class T>
cudaError_t backward(const DeformConv2d& p, const Source& source, cudaStream_t stream) {
  const Rows& n = source.n;
  auto* columns = static_cast<T*>(p.columns);
  auto* input = static_cast<const T*>(p.input);
  int64_t of_output = int64_t{n.points} * p.channels;
  GradRows rows{of_output, p.channels};
  cudaError_t error = cudaSuccess;
  if (p.grad_input) {
    Segments all{n.batch, n.heads, n.queries * n.points, n.pixels};
    Strides strides{n.queries * of_output, p.channels, n.channels};
    error = transpose_gather<T>(Columns{source, 0}, source.maps, all, columns, strides, static_cast<T*>(p.grad_input),
                                n.channels, p.scratch, p.scratch_bytes, stream);
  }
  if (error != cudaSuccess) return error;
  if (p.sample) return grad_points<T>(source, input, columns, rows, stream);  // last: it replaces the gradients
  if (p.grad_offset || p.grad_mask) return grad_points<T>(source, input, static_cast<const T*>(columns), rows, stream);
  return cudaSuccess;
}

}  // namespace
}  // namespace accel

extern "C" int accel_deform_conv2d_backward(const accel::DeformConv2d* p, void* stream) {
  accel::Source source;
  if (!accel::read(*p, source)) return cudaErrorInvalidValue;
  return accel::by_dtype(p->dtype, [&](auto of) {
    return accel::backward<decltype(of)>(*p, source, cudaStream_t(stream));
  });
}

extern "C" int64_t accel_deform_conv2d_scratch(const accel::DeformConv2d* p) {
  accel::Source source;
  if (!accel::read(*p, source)) return -1;
  return accel::transpose_scratch(p->groups, source.n.queries * source.n.points, source.n.pixels);
}
