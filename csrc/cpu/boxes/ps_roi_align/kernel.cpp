// Sums of weighted pixels of the bins of boxes, and the way back: the core of ps_roi_align and ps_roi_pool.
//
// Forward, a task owns a box. Backward, it owns a channel of an image, and walks over the boxes in their order, so that
// every sum has one owner. A pixel of weight 0 is passed over: it may hold a NaN that no sample has seen.

#include "params.h"

#include <algorithm>

#include "cpu/_sampling.h"

namespace accel::ACCEL_ISA::bins {
namespace {

// x where the weight is not 0, else 0.
inline vf where(vf weight, vf x) { return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & (weight != 0.0f)); }

template <typename T>
float sum_of(const Params& p, const T* plane, const Span& rows, const Span& columns) {
  const float *along_y = p.weights + rows.weights, *along_x = p.weights + columns.weights;
  vf sum{};
  for (int y = 0; y < rows.count; ++y) {
    if (along_y[y] == 0.0f) continue;
    const T* line = plane + (rows.first + y) * p.width + columns.first;
    vf part{};
    for (int x = 0; x < columns.count; x += W) {
      const int rest = columns.count - x;
      const vf weight = load(along_x + x), pixels = rest < W ? load_part(line + x, rest) : load(line + x);
      part += weight * where(weight, pixels);
    }
    sum += splat(along_y[y]) * part;
  }
  return sum_lanes(sum)[0] / (rows.divisor * columns.divisor);
}

template <typename T>
void gather(const Forward& f, int64_t from, int64_t to) {
  const Params& p = f.p;
  for (int64_t k = from; k < to; ++k) {
    T* out = static_cast<T*>(f.out) + k * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      float value = 0.0f;
      if (p.image[k] >= 0) {
        const T* plane = static_cast<const T*>(f.input) + (p.image[k] * p.channels + c) * p.height * p.width;
        const int64_t i = c / p.bins_x % p.bins_y, j = c % p.bins_x;
        value = sum_of(p, plane, p.rows[k * p.bins_y + i], p.columns[k * p.bins_x + j]);
      }
      from_float(value, out + c);
    }
  }
}

// plane += grad · weights, where they are not 0.
void add_to(const Params& p, float* plane, const Span& rows, const Span& columns, float grad) {
  const float *along_y = p.weights + rows.weights, *along_x = p.weights + columns.weights;
  for (int y = 0; y < rows.count; ++y) {
    if (along_y[y] == 0.0f) continue;
    float* line = plane + (rows.first + y) * p.width + columns.first;
    const vf factor = splat(grad * along_y[y]);
    for (int x = 0; x < columns.count; x += W) {
      const int rest = columns.count - x;
      const vf weight = load(along_x + x), more = where(weight, factor * weight);
      if (rest < W) {
        store_part(line + x, load_part(line + x, rest) + more, rest);
      } else {
        store(line + x, load(line + x) + more);
      }
    }
  }
}

template <typename T>
void spread(const Backward& b, int64_t from, int64_t to) {
  const Params& p = b.p;
  const int64_t pixels = p.height * p.width;
  Buffer plane(pixels);
  for (int64_t n = from; n < to; ++n) {
    const int64_t c = n % p.channels, i = c / p.bins_x % p.bins_y, j = c % p.bins_x;
    std::fill(plane.data(), plane.end(), 0.0f);
    for (int64_t k = 0; k < p.boxes; ++k) {
      if (p.image[k] != n / p.channels) continue;
      const Span &rows = p.rows[k * p.bins_y + i], &columns = p.columns[k * p.bins_x + j];
      const float grad = to_float(static_cast<const T*>(b.grad_out)[k * p.channels + c]);
      add_to(p, plane, rows, columns, grad / (rows.divisor * columns.divisor));
    }
    store_row(static_cast<T*>(b.grad_input) + n * pixels, plane.data(), int(pixels), 1.0f);
  }
}

}  // namespace

void gather_bins(const Forward& f, int64_t from, int64_t to) {
  switch (f.p.dtype) {
    case Dtype::f32: return gather<float>(f, from, to);
    case Dtype::bf16: return gather<bf16>(f, from, to);
    case Dtype::f16: return gather<fp16>(f, from, to);
  }
}

void spread_bins(const Backward& b, int64_t from, int64_t to) {
  switch (b.p.dtype) {
    case Dtype::f32: return spread<float>(b, from, to);
    case Dtype::bf16: return spread<bf16>(b, from, to);
    case Dtype::f16: return spread<fp16>(b, from, to);
  }
}

}  // namespace accel::ACCEL_ISA::bins
