// Deformable attention of DCNv3 and DCNv4: every output and group sums the taps of its window (_points.cuh).

#include "cuda/deformable/deform_attention2d.h"

#include "cuda/deformable/points.cuh"

namespace accel {
namespace {

struct Axis {
  int stride, padding, dilation, middle;

  // Where a tap of an output stands before it is shifted, apart from the window's middle.
  __device__ float base(int out) const { return float(out * stride - padding + middle); }
  __device__ float step(int tap) const { return float(tap * dilation - middle); }
};

struct Source {
  Rows n;
  Maps maps;
  Axis y_axis, x_axis;
  int out_width, outputs, kernel_height;
  int centre;  // the tap that is left out, or more than there are
  bool softmax;
  float scale;
  const float* offset;
  const float* mask;
  float* grad_offset;
  float* grad_mask;

  // Of a row's mask: the largest value, and 1 / Σ exp(value - largest).
  __device__ float2 begin_row(int64_t row, int sub, int lanes) const {
    if (!softmax) return make_float2(0.f, 1.f);
    const float* values = mask + row * n.points;
    float largest = __int_as_float(int(0xff800000)), sum = 0.f;  // -inf
    for (int k = sub; k < n.points; k += lanes) largest = fmaxf(largest, __ldg(values + k));
    for (int bits = lanes / 2; bits > 0; bits /= 2) largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, bits));
    for (int k = sub; k < n.points; k += lanes) sum += expf(__ldg(values + k) - largest);
    for (int bits = lanes / 2; bits > 0; bits /= 2) sum += __shfl_xor_sync(all_lanes, sum, bits);
    return make_float2(largest, 1.f / sum);
  }

  __device__ float weight(int64_t at, float2 shared) const {
    float value = __ldg(mask + at);
    return softmax ? expf(value - shared.x) * shared.y : value;
  }

  __device__ Point point(int64_t row, int k, float2 shared) const {
    int output = int(row / n.heads % outputs), i = output / out_width, j = output - i * out_width;
    int tap = k + (k >= centre), column = tap / kernel_height, line = tap - column * kernel_height;
    int64_t at = row * n.points + k;
    float2 shift = __ldg(reinterpret_cast<const float2*>(offset) + at);
    float y = y_axis.base(i) + y_axis.step(line) * scale + shift.y * scale;
    float x = x_axis.base(j) + x_axis.step(column) * scale + shift.x * scale;
    return {y, x, weight(at, shared), scale, scale, 0, maps.only};
  }

  __device__ void write(int64_t row, int k, float y, float x, float weight) const {
    int64_t at = row * n.points + k;
    if (grad_offset) reinterpret_cast<float2*>(grad_offset)[at] = make_float2(x, y);
    if (grad_mask) grad_mask[at] = weight;
  }
};

// grad_mask holds the gradients of the weights and gets those of what the softmax was made from.
__global__ void __launch_bounds__(256) softmax_backward(const __grid_constant__ Source source) {
  int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= source.n.count()) return;
  float2 shared = source.begin_row(row, 0, 1);
  int64_t first = row * source.n.points;
  float mean = 0.f;
  for (int k = 0; k < source.n.points; ++k) mean += source.weight(first + k, shared) * source.grad_mask[first + k];
  for (int k = 0; k < source.n.points; ++k) {
    float grad = source.grad_mask[first + k] - mean;
    source.grad_mask[first + k] = source.weight(first + k, shared) * grad;
  }
}

bool read(const DeformAttention2d& p, Source& s) {
  int64_t outputs = int64_t{p.out_height} * p.out_width, pixels = int64_t{p.height} * p.width;
  int64_t taps = int64_t{p.kernel[0]} * p.kernel[1];
  if (p.height < 1 || p.width < 1 || p.out_height < 1 || p.out_width < 1 || outputs > int_most || pixels > int_most)
    return false;
  if (p.kernel[0] < 1 || p.kernel[1] < 1 || p.taps < 0 || p.taps != taps - (p.remove_center ? 1 : 0)) return false;
  if (p.groups < 1 || p.channels % p.groups) return false;
  auto axis = [&](int i) {
    int middle = int(int64_t{p.dilation[i]} * (p.kernel[i] - 1) / 2);
    return Axis{p.stride[i], p.padding[i], p.dilation[i], middle};
  };
  s.n = {p.batch, int(outputs), p.groups, p.channels / p.groups, int(pixels), p.taps};
  s.maps = {1, int(pixels), {p.height, p.width, 0}, nullptr, nullptr};
  s.y_axis = axis(0);
  s.x_axis = axis(1);
  s.out_width = p.out_width;
  s.outputs = int(outputs);
  s.kernel_height = p.kernel[0];
  s.centre = p.remove_center ? p.taps / 2 : p.taps;
  s.softmax = p.softmax != 0;
  s.scale = p.offset_scale;
  s.offset = p.offset;
  s.mask = p.mask;
  s.grad_offset = p.grad_offset;
  s.grad_mask = p.grad_mask;
  return rows_fit(s.n);
}

template <class T>
cudaError_t backward(const DeformAttention2d& p, const Source& source, cudaStream_t stream) {
  auto* grad_out = static_cast<const T*>(p.grad_out);
  cudaError_t error = cudaSuccess;
  if (p.grad_offset || p.grad_mask)
    error = grad_points(source, static_cast<const T*>(p.input), grad_out, GradRows{p.channels, 0}, stream);
  if (error == cudaSuccess && p.grad_mask && source.softmax && source.n.count() > 0)
    error = launch(softmax_backward, dim3(blocks_for(source.n.count(), 256)), dim3(256), 0, stream, source);
  if (error == cudaSuccess && p.grad_input)
    error = grad_map(source, source.maps, grad_out, static_cast<T*>(p.grad_input), p.scratch, p.scratch_bytes, stream);
  return error;
}

}  // namespace
}  // namespace accel

extern "C" int accel_deform_attention2d_forward(const accel::DeformAttention2d* p, void* stream) {
  accel::Source source;
  if (!accel::read(*p, source)) return cudaErrorInvalidValue;
  return accel::by_dtype(p->dtype, [&](auto of) {
    using T = decltype(of);
    return accel::sum_samples(source, static_cast<const T*>(p->input), static_cast<T*>(p->out), cudaStream_t(stream));
  });
}

extern "C" int accel_deform_attention2d_backward(const accel::DeformAttention2d* p, void* stream) {
  accel::Source source;
  if (!accel::read(*p, source)) return cudaErrorInvalidValue;
  return accel::by_dtype(p->dtype, [&](auto of) {
    return accel::backward<decltype(of)>(*p, source, cudaStream_t(stream));
  });
}

extern "C" int64_t accel_deform_attention2d_scratch(const accel::DeformAttention2d* p) {
  accel::Source source;
  if (!accel::read(*p, source)) return -1;
  return accel::transpose_scratch(p->groups, source.outputs * p->taps, source.maps.pixels);
}
