// Sums of weighted samples on the CPU: the core of ms_deform_attn and deform_attention2d, forward and backward.
//
// A block of queries of one head at a time: corners and weights of all its points are computed in whole vectors, then the
// rows of the corners are summed. Backward reads each corner's row once, for its product with the upstream gradient, and
// adds to the same pixel's gradient on the way.

#include "params.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "cpu/_sampling.h"

namespace accel::ACCEL_ISA::samples {
namespace {

constexpr int POINTS_AT_ONCE = 48;  // measured, 16 points a query: 64 take an eighth longer forward, 128 a quarter
// Corners in an order that takes no neighbour's row after a row: of four lines on end a processor would foresee more.
constexpr int BY_COLUMN[4] = {0, 2, 1, 3};
constexpr int AHEAD = 6;  // points between the fetch of a row and its use in backward; forward gains nothing by it

// Asks for the lines of a row of n elements.
template <typename T>
inline void ask_for(const T* row, int64_t n) {
  const char* line = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < n * int64_t(sizeof(T)); i += 64) __builtin_prefetch(line + i);
}

// Beyond −1, which `corners_of` takes for near itself.
inline Lanes past_border(vf x) {
  constexpr float AFTER = -0x1.fffffep-1f;  // the next float
  return from_to(x, AFTER, splat(std::numeric_limits<float>::infinity()));
}

// The samples of a block of queries of one head. Their corners are indices, `step` from one pixel to the next.
class Block {
 public:
  Block(const Params& p, int64_t step, int64_t outside)
      : p(p),
        P(p.points),
        most(std::max(1, POINTS_AT_ONCE / p.points)),
        ld(int(round_up(most * P + std::max(AHEAD, W), W))),
        step_(uint32_t(step)),
        outside_(int32_t(outside)),
        floats_(13 * int64_t(ld)),
        ints_(9 * int64_t(ld)) {
    float* f = floats_;
    for (float** to : {&y, &x, &weight, &dy, &dx, &place_y_, &place_x_, &scale_y, &scale_x}) *to = f, f += ld;
    for (float*& to : corner_weight) to = f, f += ld;
    int32_t* i = reinterpret_cast<int32_t*>(ints_.data());
    for (int32_t** to : {&near, &height_, &width_, &start_, &line_}) *to = i, i += ld;
    for (int32_t*& to : at) to = i, i += ld;
    std::fill(floats_.data(), floats_.end(), 0.0f);
    std::fill(reinterpret_cast<int32_t*>(ints_.data()), i, 0);
    for (int32_t* rows : at) std::fill(rows, rows + ld, outside_);
    for (int n = 0; n < most * P; ++n) {
      const Point& point = p.point[n % P];
      place_y_[n] = point.place_y, place_x_[n] = point.place_x;
      scale_y[n] = point.scale_y, scale_x[n] = point.scale_x;
      height_[n] = point.height, width_[n] = point.width;
      start_[n] = int32_t(point.start * step), line_[n] = int32_t(point.width * step);
    }
  }

  // Corners and weights of queries [query, query + count) of head m. SLOPES: and what derivatives are made of.
  template <bool SLOPES>
  void move_to(int64_t n, int64_t m, int64_t query, int queries) {
    count = queries * P;
    first = (n * p.queries + query) * p.heads + m;
    for (int q = 0; q < queries; ++q) {
      const int64_t row = (first + q * p.heads) * P;
      const float base_y = p.first_y + float((query + q) / p.line) * p.step_y;
      const float base_x = p.first_x + float((query + q) % p.line) * p.step_x;
      read(p.positions + 2 * row, p.weights + row, base_y, base_x, q * P);
    }
    for (int i = 0; i < count; i += W) {
      const Pitch pitch{load_unsigned(start_ + i), load_unsigned(line_ + i), vu{} + step_, splat_int(outside_)};
      const Corners c = corners_of(load(y + i), load(x + i), load(height_ + i), load(width_ + i), pitch);
      const vf factor = load(weight + i);
      for (int k = 0; k < 4; ++k) {
        store(at[k] + i, c.at[k]);
        store(corner_weight[k] + i, c.weight[k] * factor);
      }
      if (!SLOPES) continue;
      Lanes has_slopes = c.near;
      if (!p.border_gradient) has_slopes = both(has_slopes, both(past_border(load(y + i)), past_border(load(x + i))));
      store(dy + i, c.dy), store(dx + i, c.dx), store(near + i, where(has_slopes, ~vi{}, vi{}));
    }
  }

  const Params& p;
  const int P, most, ld;  // points of a query, queries of a full block, and the length of every array
  int count = 0;          // points of the block; arrays are as long as whole vectors need
  int64_t first = 0;      // (n, query, m) as one index, that of the next query is `heads` further
  float *y, *x, *weight, *dy, *dx, *scale_y, *scale_x;
  float* corner_weight[4];  // times the point's weight
  int32_t *near, *at[4];    // at[k + 1] is ld behind at[k], as corner_weight are

 private:
  void read(const float* position, const float* factor, float base_y, float base_x, int to) {
    float* ws = weight + to;
    for (int i = 0; i < P; i += W) {
      const int rest = std::min(W, P - i), n = to + i;
      vf shift_x, shift_y;
      load_pairs(position + 2 * i, rest, shift_x, shift_y);
      const vf at_x = base_x + load(place_x_ + n) + shift_x * load(scale_x + n);
      const vf at_y = base_y + load(place_y_ + n) + shift_y * load(scale_y + n);
      store(x + n, at_x), store(y + n, at_y);
    }
    if (!p.softmax) {
      std::copy_n(factor, P, ws);
      return;
    }
    float top = factor[0], sum = 0.0f;
    for (int i = 1; i < P; ++i) top = std::max(top, factor[i]);
    for (int i = 0; i < P; ++i) ws[i] = (factor[i] - top) * LOG2_E;
    for (int i = 0; i < P; i += W) {
      const int rest = std::min(W, P - i);
      store_part(ws + i, exp2_nonpositive(load_part(ws + i, rest)), rest);
    }
    for (int i = 0; i < P; ++i) sum += ws[i];
    for (int i = 0; i < P; ++i) ws[i] /= sum;
  }

  const uint32_t step_;
  const int32_t outside_;
  Buffer floats_, ints_;
  float *place_y_, *place_x_;
  int32_t *height_, *width_, *start_, *line_;
};

// One head's map. PACKED: corners are indices of bytes, of a row of zeros for those outside; else of rows.
template <typename T, bool PACKED>
struct Map {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;

  T* rows;
  int64_t stride;
  T* none;  // the row of those outside, if it isn't one of the map

  Map from(int64_t channel) const { return {rows + channel, stride, PACKED ? none : none + channel}; }
  T* row(int32_t at) const {
    if constexpr (PACKED) return reinterpret_cast<T*>(reinterpret_cast<Byte*>(rows) + at);
    return row_of(rows, stride, at, none);
  }
};

template <typename T, bool PACKED, int NV, bool PART>
inline void sum_points(const Map<const T, PACKED>& map, const Block& b, int first, T* out, int last, bool stream) {
  vf even[NV] = {}, odd[NV] = {};
  const int64_t ld = b.ld;  // of which all eight addresses are made: as many pointers would not fit into registers
  const int32_t* at = b.at[0] + first;
  const float* weights = b.corner_weight[0] + first;
  for (const float* end = weights + b.P; weights < end; ++weights, ++at) {
#pragma GCC unroll 4
    for (int k : BY_COLUMN) {
      const vf weight = splat(weights[k * ld]);
      vf x[NV];
      load_all<NV, PART>(map.row(at[k * ld]), last, x);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) (k & 1 ? odd : even)[v] += weight * x[v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) even[v] += odd[v];
  STREAMS && stream ? stream_all(out, even) : store_all<NV, PART>(out, last, even);
}

template <typename T, bool PACKED>
void sum_units(const Forward& f, int64_t from, int64_t to) {
  const Params& p = f.p;
  const int64_t D = p.channels, chunks = (p.queries + f.chunk - 1) / f.chunk;
  const int64_t step = D * int64_t(sizeof(T));
  Block b(p, PACKED ? step : 1, PACKED ? p.pixels * step : OUTSIDE);
  Buffer none(D);
  std::fill(none.data(), none.end(), 0.0f);
  Map<const T, PACKED> map{nullptr, p.heads * D, reinterpret_cast<const T*>(none.data())};
  for (int64_t unit = from; unit < to; ++unit) {
    const int64_t pair = f.first_pair + unit / chunks, n = pair / p.heads, m = pair % p.heads;
    const int64_t begin = unit % chunks * f.chunk, end = std::min(begin + f.chunk, p.queries);
    map.rows = PACKED ? static_cast<const T*>(f.packed) + unit / chunks * f.map()
                      : static_cast<const T*>(p.value) + (n * p.pixels * p.heads + m) * D;
    for (int64_t query = begin; query < end; query += b.most) {
      const int queries = int(std::min<int64_t>(b.most, end - query));
      T* out = static_cast<T*>(f.out) + ((n * p.queries + query) * p.heads + m) * D;
      b.move_to<false>(n, m, query, queries);
      for (int q = 0; q < queries; ++q, out += p.heads * D)
        for_each_run<4>(D, [&]<int NV, bool PART>(int64_t c, int last) {
          sum_points<T, PACKED, NV, PART>(map.from(c), b, q * b.P, out + c, last, f.stream);
        });
    }
  }
  end_of_streams();
}

template <typename T>
void forward(const Forward& f, int64_t from, int64_t to) {
  f.packed ? sum_units<T, true>(f, from, to) : sum_units<T, false>(f, from, to);
}

// Rows [from, to) of the pairs' maps, each of which ends in a row of zeros.
template <typename T>
void pack(const Forward& f, int64_t from, int64_t to) {
  const Params& p = f.p;
  const int64_t D = p.channels, step = p.heads * D, rows = p.pixels + 1;
  while (from < to) {
    const int64_t map = from / rows, first = from % rows, last = std::min(first + to - from, rows);
    const int64_t pair = f.first_pair + map;
    const T* src = static_cast<const T*>(p.value) + (pair / p.heads * p.pixels * p.heads + pair % p.heads) * D;
    T* dst = static_cast<T*>(f.packed) + map * f.map();
    for (int64_t s = first; s < std::min(last, p.pixels); ++s) std::copy_n(src + s * step, D, dst + s * D);
    if (last == rows) std::fill_n(dst + p.pixels * D, D, T{});
    from += last - first;
  }
}

// --- backward ---

// Sums of gradients have the lanes of load_all until they are collected.
template <typename T, bool PACKED>
class Gradients {
 public:
  explicit Gradients(const Backward& b)
      : b(b),
        p(b.p),
        block(b.p, PACKED ? 4 * b.row : 1, PACKED ? 4 * b.p.pixels * b.row : OUTSIDE),
        D(b.p.channels),
        most_waiting_(int(round_up(std::max(2 * W, b.p.points), W))),
        none_(D),
        thrown_away_(D),
        products_(int64_t(most_waiting_) * W),
        dots_(4 * int64_t(block.ld)),
        results_(3 * int64_t(block.ld)) {
    for (Buffer* x : {&none_, &thrown_away_, &products_, &dots_, &results_}) std::fill(x->data(), x->end(), 0.0f);
  }

  void run(int64_t task) {
    const int64_t pair = b.first_pair + task / b.parts, n = pair / p.heads, m = pair % p.heads;
    const int64_t part = task % b.parts, begin = p.queries * part / b.parts, end = p.queries * (part + 1) / b.parts;
    start_map(task, n, m);
    const bool dots = b.grad_positions || b.grad_weights;
    for (int64_t query = begin; query < end; query += block.most) {
      const int queries = int(std::min<int64_t>(block.most, end - query));
      const T* grad = static_cast<const T*>(b.grad_out) + ((n * p.queries + query) * p.heads + m) * D;
      for (int q = 0; q < queries; ++q) ask_for(grad + q * p.heads * D, D);
      block.move_to<true>(n, m, query, queries);
      if (dots && b.grad_value) {
        through_corners<true, true>(grad, queries);
      } else if (dots) {
        through_corners<true, false>(grad, queries);
      } else {
        through_corners<false, true>(grad, queries);
      }
      if (dots) finish(queries);
    }
  }

 private:
  // Where the task reads values and sums gradients; its sums begin at 0.
  void start_map(int64_t task, int64_t n, int64_t m) {
    const int64_t head = (n * p.pixels * p.heads + m) * D, stride = p.heads * D;
    float* map = b.maps ? b.maps + task * b.map() : nullptr;
    const T* value = static_cast<const T*>(p.value) + head;
    if constexpr (PACKED) {
      values_ = {reinterpret_cast<const T*>(map), 0, nullptr}, sums_ = {map + b.values, 0, nullptr};
      for (int64_t s = 0; s <= p.pixels; ++s) {
        float* row = map + s * b.row;
        if (s < p.pixels) {
          std::copy_n(value + s * stride, D, reinterpret_cast<T*>(row));
          row += b.values;
        }
        std::fill(row, map + (s + 1) * b.row, 0.0f);
      }
    } else {
      values_ = {value, stride, reinterpret_cast<const T*>(none_.data())};
      sums_ = {map ? map : static_cast<float*>(b.grad_value) + head, map ? b.row : stride, thrown_away_.data()};
      if (b.grad_value)
        for (int64_t s = 0; s < p.pixels; ++s) std::fill_n(sums_.rows + s * sums_.stride, D, 0.0f);
    }
  }

  // The products of each corner's row with the upstream gradient, and the gradients of the rows.
  template <bool DOTS, bool SUMS>
  void through_corners(const T* grad, int queries) {
    int waiting = 0;
    for (int q = 0; q < queries; ++q, grad += p.heads * D) {
      for_each_run<4>(D, [&]<int NV, bool PART>(int64_t c, int last) {
        through_points<NV, PART, DOTS, SUMS>(grad + c, q * block.P, products_ + int64_t(waiting) * W, c, last);
      });
      waiting += block.P;
      if (DOTS && (waiting + block.P > most_waiting_ || q + 1 == queries)) {
        reduce((q + 1) * block.P - waiting, waiting);
        waiting = 0;
      }
    }
  }

  template <int NV, bool PART, bool DOTS, bool SUMS>
  void through_points(const T* grad, int first, float* products, int64_t c, int last) {
    // copies, for all the compiler knows the stores below may change members
    const Map<const T, PACKED> values = values_.from(c);
    const Map<float, PACKED> sums = sums_.from(c);
    const int32_t* const at[4] = {block.at[0], block.at[1], block.at[2], block.at[3]};
    const float* const weight[4] = {block.corner_weight[0], block.corner_weight[1], block.corner_weight[2],
                                    block.corner_weight[3]};
    vf g[NV];
    load_all<NV, PART>(grad, last, g);
    for (int i = first, end = first + block.P; i < end; ++i, products += W) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        if (DOTS) ask_for(values.row(at[k][i + AHEAD]), NV * W);
        if (SUMS) ask_for(sums.row(at[k][i + AHEAD]), NV * W);
      }
      vf product[4] = {};
#pragma GCC unroll 4
      for (int k : BY_COLUMN) {
        const int32_t pixel = at[k][i];
        if constexpr (DOTS) {
          vf x[NV];
          load_all<NV, PART>(values.row(pixel), last, x);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) product[k] += g[v] * x[v];
        }
        if constexpr (SUMS) {
          float* sum = sums.row(pixel);
          const vf w = splat(weight[k][i]);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v)
            store_of<NV, PART>(sum, v, last, load_of<NV, PART>(sum, v, last) + w * g[v]);
        }
      }
      if (DOTS) {
        const vf parts = parts_of(product);
        store(products, c ? load(products) + parts : parts);
      }
    }
  }

  void reduce(int first, int count) {
    for (int i = 0; i < count; i += W / 4) {
      vf r[W];
#pragma GCC unroll 4
      for (int j = 0; j < W; j += 4) r[j] = load(products_ + (int64_t(i) * 4 + j) * W / 4);
      store(dots_ + 4 * int64_t(first + i), sums_of<4>(r));
    }
  }

  // Gradients of positions and weights of the block from the products of its corners.
  void finish(int queries) {
    const int ld = block.ld;
    float *to_y = results_, *to_x = to_y + ld, *to_weight = to_x + ld;
    for (int i = 0; i < block.count; i += W) {
      vf dot[4];
      load_fours(dots_ + 4 * int64_t(i), dot);
      const vf dy = load(block.dy + i), dx = load(block.dx + i), factor = load(block.weight + i);
      const vi near = load(block.near + i);
      const vf by_y = slope_y(dot, dx) * factor * load(block.scale_y + i);
      const vf by_x = slope_x(dot, dy) * factor * load(block.scale_x + i);
      store(to_y + i, reinterpret_cast<vf>(reinterpret_cast<vi>(by_y) & near));
      store(to_x + i, reinterpret_cast<vf>(reinterpret_cast<vi>(by_x) & near));
      store(to_weight + i, (1.0f - dy) * ((1.0f - dx) * dot[0] + dx * dot[1]) +
                               dy * ((1.0f - dx) * dot[2] + dx * dot[3]));
    }
    for (int q = 0; q < queries; ++q) {
      const int64_t row = (block.first + q * p.heads) * block.P;
      const int at = q * block.P;
      if (b.grad_positions) {
        float* out = b.grad_positions + 2 * row;
        for (int i = 0; i < block.P; ++i) out[2 * i] = to_x[at + i], out[2 * i + 1] = to_y[at + i];
      }
      if (b.grad_weights) write_weights(block.weight + at, to_weight + at, b.grad_weights + row);
    }
  }

  void write_weights(const float* weight, const float* grad, float* out) {
    float dot = 0.0f;
    if (p.softmax)
      for (int i = 0; i < block.P; ++i) dot += weight[i] * grad[i];
    for (int i = 0; i < block.P; ++i) out[i] = p.softmax ? weight[i] * (grad[i] - dot) : grad[i];
  }

  const Backward& b;
  const Params& p;
  Block block;
  const int64_t D;
  const int most_waiting_;
  Buffer none_, thrown_away_;
  Buffer products_;  // (most_waiting_, W): sums in parts, see parts_of
  Buffer dots_;      // (ld, 4)
  Buffer results_;   // (3, ld)
  Map<const T, PACKED> values_;
  Map<float, PACKED> sums_;
};

template <typename T>
void backward(const Backward& b, int64_t from, int64_t to) {
  auto run = [&](auto gradients) {
    for (int64_t task = from; task < to; ++task) gradients->run(task);
  };
  if (b.packed) {
    run(std::make_unique<Gradients<T, true>>(b));
  } else {
    run(std::make_unique<Gradients<T, false>>(b));
  }
}

// Sums of the parts' maps, in their order: rows [from, to) of the pairs.
template <typename T>
void collect(const Backward& b, int64_t from, int64_t to) {
  const Params& p = b.p;
  const int64_t D = p.channels, step = p.heads * D;
  while (from < to) {
    const int64_t i = from / p.pixels, first = from % p.pixels, last = std::min(first + to - from, p.pixels);
    const int64_t pair = b.first_pair + i;
    float* map = b.maps + i * b.parts * b.map() + b.values;
    T* out = static_cast<T*>(b.grad_value) + (pair / p.heads * p.pixels * p.heads + pair % p.heads) * D;
    for (int64_t s = first; s < last; ++s) {
      float* sum = map + s * b.row;
      for (int64_t part = 1; part < b.parts; ++part) add_row(sum + part * b.map(), 1.0f, sum, D);
      for_each_run<4>(D, [&]<int NV, bool PART>(int64_t c, int last_lanes) {
        vf x[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) x[v] = load_of<NV, PART>(sum + c, v, last_lanes);
        store_all<NV, PART>(out + s * step + c, last_lanes, x);
      });
    }
    from += last - first;
  }
}

#define ACCEL_BY_DTYPE(dtype, call)                             \
  [[maybe_unused]] FlushSubnormals flush;                       \
  if (dtype == Dtype::f32) call<float>(work, from, to);         \
  if (dtype == Dtype::bf16) call<bf16>(work, from, to);         \
  if (dtype == Dtype::f16) call<fp16>(work, from, to)

}  // namespace

void pack_maps(const Forward& work, int64_t from, int64_t to) { ACCEL_BY_DTYPE(work.p.dtype, pack); }
void sum_samples(const Forward& work, int64_t from, int64_t to) { ACCEL_BY_DTYPE(work.p.dtype, forward); }
void sum_gradients(const Backward& work, int64_t from, int64_t to) { ACCEL_BY_DTYPE(work.p.dtype, backward); }
void collect_maps(const Backward& work, int64_t from, int64_t to) { ACCEL_BY_DTYPE(work.p.dtype, collect); }

}  // namespace accel::ACCEL_ISA::samples
