// Sums of weighted samples on the CPU: the core of ms_deform_attn and deform_attention2d, forward and backward.
//
// A block of queries of one head at a time: corners and weights of all its points are computed in whole vectors, while
// the positions of the next block are fetched, then the rows of the corners are summed. Backward reads each corner's row
// once, for its product with the upstream gradient, and adds to the same pixel's gradient on the way.

#include "params.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../_sampling.h"

namespace accel::ACCEL_ISA {
namespace {

constexpr int POINTS_AT_ONCE = 64;  // their arrays share the first-level cache with the rows: 128 take an eighth longer
constexpr int AHEAD = 6;  // points between the fetch of a row and its use in backward; forward gains nothing by it

// The samples of a block of queries of one head.
class Block {
 public:
  explicit Block(const Params& p)
      : p(p),
        P(p.points),
        most(std::max(1, POINTS_AT_ONCE / p.points)),
        ld(int(round_up(most * P + std::max(AHEAD, W), W))),
        floats_(13 * int64_t(ld)),
        ints_(8 * int64_t(ld)) {
    float* f = floats_;
    for (float** to : {&y, &x, &weight, &dy, &dx, &place_y_, &place_x_, &scale_y, &scale_x}) *to = f, f += ld;
    for (float*& to : corner_weight) to = f, f += ld;
    int32_t* i = reinterpret_cast<int32_t*>(ints_.data());
    for (int32_t** to : {&near, &height_, &width_, &start_}) *to = i, i += ld;
    for (int32_t*& to : at) to = i, i += ld;
    std::fill(floats_.data(), floats_.end(), 0.0f);
    std::fill(reinterpret_cast<int32_t*>(ints_.data()), i, 0);
    for (int32_t* rows : at) std::fill(rows, rows + ld, OUTSIDE);
    for (int n = 0; n < most * P; ++n) {
      const Point& point = p.point[n % P];
      place_y_[n] = point.place_y, place_x_[n] = point.place_x;
      scale_y[n] = point.scale_y, scale_x[n] = point.scale_x;
      height_[n] = point.height, width_[n] = point.width, start_[n] = point.start;
    }
  }

  // Corners and weights of queries [query, query + count) of head m. SCALED: corner weights are multiplied by the points'.
  template <bool SCALED>
  void move_to(int64_t n, int64_t m, int64_t query, int queries) {
    count = queries * P;
    first = (n * p.queries + query) * p.heads + m;
    fetch(query + queries);
    for (int q = 0; q < queries; ++q) {
      const int64_t row = (first + q * p.heads) * P;
      const float base_y = p.first_y + float((query + q) / p.line) * p.step_y;
      const float base_x = p.first_x + float((query + q) % p.line) * p.step_x;
      read(p.positions + 2 * row, p.weights + row, base_y, base_x, q * P);
    }
    for (int i = 0; i < count; i += W) {
      const Corners c = corners_of(load(y + i), load(x + i), load(height_ + i), load(width_ + i), load(start_ + i));
      const vf factor = load(weight + i);
      for (int k = 0; k < 4; ++k) {
        store(at[k] + i, c.at[k]);
        store(corner_weight[k] + i, SCALED ? c.weight[k] * factor : c.weight[k]);
      }
      if (!SCALED) store(dy + i, c.dy), store(dx + i, c.dx), store(near + i, c.near);
    }
  }

  const Params& p;
  const int P, most, ld;  // points of a query, queries of a full block, and the length of every array
  int count = 0;          // points of the block; arrays are as long as whole vectors need
  int64_t first = 0;      // (n, query, m) as one index, that of the next query is `heads` further
  float *y, *x, *weight, *dy, *dx, *scale_y, *scale_x, *corner_weight[4];
  int32_t *near, *at[4];

 private:
  // The next block's positions and weights, which are too far apart for the processor to foresee them.
  void fetch(int64_t query) const {
    const int64_t queries = std::min<int64_t>(most, p.queries - query);
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t row = (first + (count / P + q) * p.heads) * P;
      for (int i = 0; i < 2 * P; i += 16) __builtin_prefetch(p.positions + 2 * row + i);
      for (int i = 0; i < P; i += 16) __builtin_prefetch(p.weights + row + i);
    }
  }

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

  Buffer floats_, ints_;
  float *place_y_, *place_x_;
  int32_t *height_, *width_, *start_;
};

// Rows of one head's map, what stands for a row outside of it, and where the corners of a block's points are.
template <typename T>
struct Map {
  T* rows;
  int64_t stride;
  T* none;
  std::vector<T*> row[4];

  void look_up(const Block& b) {
    T *const from = rows, *const outside = none;
    const int64_t step = stride;
    for (int k = 0; k < 4; ++k) {
      const int32_t* at = b.at[k];
      row[k].resize(size_t(b.ld), outside);
      T** to = row[k].data();
      for (int i = 0; i < b.count; ++i) to[i] = at[i] < 0 ? outside : from + at[i] * step;
    }
  }
  void fetch(int k, int i, int bytes) const {
    const char* line = reinterpret_cast<const char*>(row[k][size_t(i)]);
    for (int n = 0; n < bytes; n += 64) __builtin_prefetch(line + n);
  }
};

template <typename T, int NV, bool PART>
inline void sum_points(const Map<const T>& map, const Block& b, int first, T* out, int64_t c, int last) {
  const T* const* const row[4] = {map.row[0].data(), map.row[1].data(), map.row[2].data(), map.row[3].data()};
  vf even[NV] = {}, odd[NV] = {};
  for (int i = first; i < first + b.P; ++i) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const T* from = row[k][i] + c;
      const vf weight = splat(b.corner_weight[k][i]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) (k & 1 ? odd : even)[v] += weight * load_of<NV, PART>(from, v, last);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) store_of<NV, PART>(out + c, v, last, even[v] + odd[v]);
}

template <typename T>
void forward(const Forward& f, int64_t from, int64_t to) {
  const Params& p = f.p;
  const int64_t D = p.channels, chunks = (p.queries + f.chunk - 1) / f.chunk;
  Block b(p);
  Buffer none(D);
  std::fill(none.data(), none.end(), 0.0f);
  Map<const T> map{nullptr, f.packed ? f.row : p.heads * D, reinterpret_cast<const T*>(none.data()), {}};
  for (int64_t unit = from; unit < to; ++unit) {
    const int64_t pair = f.first_pair + unit / chunks, n = pair / p.heads, m = pair % p.heads;
    const int64_t begin = unit % chunks * f.chunk, end = std::min(begin + f.chunk, p.queries);
    map.rows = f.packed ? static_cast<const T*>(f.packed) + unit / chunks * p.pixels * f.row
                        : static_cast<const T*>(p.value) + (n * p.pixels * p.heads + m) * D;
    for (int64_t query = begin; query < end; query += b.most) {
      const int queries = int(std::min<int64_t>(b.most, end - query));
      b.move_to<true>(n, m, query, queries);
      map.look_up(b);
      T* out = static_cast<T*>(f.out) + b.first * D;
      for (int q = 0; q < queries; ++q, out += p.heads * D)
        for_each_run<4>(D, [&]<int NV, bool PART>(int64_t c, int last) {
          sum_points<T, NV, PART>(map, b, q * b.P, out, c, last);
        });
    }
  }
}

template <typename T>
void pack(const Forward& f, int64_t from, int64_t to) {
  const Params& p = f.p;
  const int64_t D = p.channels;
  for (int64_t i = from; i < to; ++i) {
    const int64_t pair = f.first_pair + i / p.pixels, n = pair / p.heads, m = pair % p.heads, s = i % p.pixels;
    std::copy_n(static_cast<const T*>(p.value) + ((n * p.pixels + s) * p.heads + m) * D, D,
                static_cast<T*>(f.packed) + i * f.row);
  }
}

// --- backward ---

template <typename V, typename T>
class Gradients {
 public:
  explicit Gradients(const Backward& b)
      : b(b),
        p(b.p),
        block(b.p),
        D(b.p.channels),
        dots_ld_(std::max(2 * W, int(round_up(b.p.points, W)))),
        none_(D),
        thrown_away_(D),
        products_(4 * int64_t(dots_ld_) * W),
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
      block.move_to<false>(n, m, query, queries);
      if (dots) values_.look_up(block);
      if (b.grad_value) sums_.look_up(block);
      if (dots && b.grad_value) {
        through_corners<true, true>(queries);
      } else if (dots) {
        through_corners<true, false>(queries);
      } else {
        through_corners<false, true>(queries);
      }
      if (dots) finish(queries);
    }
  }

 private:
  // Where the task reads values and sums gradients; its sums begin at 0.
  void start_map(int64_t task, int64_t n, int64_t m) {
    const int64_t head = (n * p.pixels * p.heads + m) * D, half = b.row / 2;
    float* map = b.maps ? b.maps + task * p.pixels * b.row : nullptr;
    const int64_t stride = p.heads * D;
    const T* value = static_cast<const T*>(p.value) + head;
    if (map) {
      point(sums_, map + (b.packed ? half : 0), b.row, thrown_away_.data());
    } else {
      point(sums_, static_cast<float*>(b.grad_value) + head, stride, thrown_away_.data());
    }
    if (!b.packed) {
      if constexpr (std::is_same_v<V, T>) point(values_, value, stride, reinterpret_cast<const V*>(none_.data()));
      if (b.grad_value)
        for (int64_t s = 0; s < p.pixels; ++s) std::fill_n(sums_.rows + s * sums_.stride, D, 0.0f);
    }
    if constexpr (std::is_same_v<V, float>) {
      if (!b.packed) return;
      point(values_, static_cast<const float*>(map), b.row, static_cast<const float*>(none_.data()));
      for (int64_t s = 0; s < p.pixels; ++s) {
        float* row = map + s * b.row;
        load_row(value + s * stride, row, int(D), int(D));
        std::fill_n(row + half, D, 0.0f);
      }
    }
  }

  template <typename U>
  static void point(Map<U>& map, U* rows, int64_t stride, U* none) {
    map.rows = rows, map.stride = stride, map.none = none;
  }

  // The products of each corner's row with the upstream gradient, and the gradients of the rows.
  template <bool DOTS, bool SUMS>
  void through_corners(int queries) {
    const T* grad = static_cast<const T*>(b.grad_out) + block.first * D;
    int waiting = 0;
    for (int q = 0; q < queries; ++q, grad += p.heads * D) {
      for_each_run<4>(D, [&]<int NV, bool PART>(int64_t c, int last) {
        through_points<NV, PART, DOTS, SUMS>(grad + c, q * block.P, waiting, c, last);
      });
      waiting += block.P;
      if (DOTS && (waiting + block.P > dots_ld_ || q + 1 == queries)) {
        reduce((q + 1) * block.P - waiting, waiting);
        waiting = 0;
      }
    }
  }

  template <int NV, bool PART, bool DOTS, bool SUMS>
  void through_points(const T* grad, int first, int waiting, int64_t c, int last) {
    vf g[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) g[v] = load_of<NV, PART>(grad, v, last);
    for (int i = first; i < first + block.P; ++i, ++waiting) {
      const float factor = block.weight[i];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        if (DOTS) values_.fetch(k, i + AHEAD, NV * W * int(sizeof(V)));
        if (SUMS) sums_.fetch(k, i + AHEAD, NV * W * 4);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        if constexpr (DOTS) {
          const V* row = values_.row[k][size_t(i)] + c;
          float* to = products_ + (int64_t(k) * dots_ld_ + waiting) * W;
          vf product = c ? load(to) : vf{};
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) product += g[v] * load_of<NV, PART>(row, v, last);
          store(to, product);
        }
        if constexpr (SUMS) {
          float* sum = sums_.row[k][size_t(i)] + c;
          const vf weight = splat(block.corner_weight[k][i] * factor);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v)
            store_of<NV, PART>(sum, v, last, load_of<NV, PART>(sum, v, last) + weight * g[v]);
        }
      }
    }
  }

  void reduce(int first, int count) {
    for (int k = 0; k < 4; ++k)
      for (int i = 0; i < count; i += W) {
        vf r[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) r[j] = load(products_ + (int64_t(k) * dots_ld_ + i + j) * W);
        const vf sums = sums_of(r);
        float* to = dots_ + int64_t(k) * block.ld + first + i;
        if (i + W <= count) {
          store(to, sums);
        } else {
          store_part(to, sums, count - i);
        }
      }
  }

  // Gradients of positions and weights of the block from the products of its corners.
  void finish(int queries) {
    const int ld = block.ld;
    float *to_y = results_, *to_x = to_y + ld, *to_weight = to_x + ld;
    for (int i = 0; i < block.count; i += W) {
      vf dot[4], sample{};
      for (int k = 0; k < 4; ++k) {
        dot[k] = load(dots_ + int64_t(k) * ld + i);
        sample += load(block.corner_weight[k] + i) * dot[k];
      }
      const vf factor = load(block.weight + i);
      const vi near = load(block.near + i);
      const vf by_y = slope_y(dot, load(block.dx + i)) * factor * load(block.scale_y + i);
      const vf by_x = slope_x(dot, load(block.dy + i)) * factor * load(block.scale_x + i);
      store(to_y + i, reinterpret_cast<vf>(reinterpret_cast<vi>(by_y) & near));
      store(to_x + i, reinterpret_cast<vf>(reinterpret_cast<vi>(by_x) & near));
      store(to_weight + i, sample);
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
  const int dots_ld_;
  Buffer none_, thrown_away_;
  Buffer products_;  // (4, dots_ld, W): lanes still to be added up
  Buffer dots_;      // (4, ld)
  Buffer results_;   // (3, ld)
  Map<const V> values_;
  Map<float> sums_;
};

template <typename T>
void backward(const Backward& b, int64_t from, int64_t to) {
  auto run = [&](auto gradients) {
    for (int64_t task = from; task < to; ++task) gradients->run(task);
  };
  if (b.packed) {
    run(std::make_unique<Gradients<float, T>>(b));
  } else {
    run(std::make_unique<Gradients<T, T>>(b));
  }
}

// Sums of the parts' maps, in their order.
template <typename T>
void collect(const Backward& b, int64_t from, int64_t to) {
  const Params& p = b.p;
  const int64_t D = p.channels, half = b.packed ? b.row / 2 : 0;
  for (int64_t i = from; i < to; ++i) {
    const int64_t round_pair = i / p.pixels, s = i % p.pixels, pair = b.first_pair + round_pair;
    float* sum = b.maps + (round_pair * b.parts * p.pixels + s) * b.row + half;
    for (int64_t part = 1; part < b.parts; ++part) add_row(sum + part * p.pixels * b.row, 1.0f, sum, D);
    T* out = static_cast<T*>(b.grad_value) + ((pair / p.heads * p.pixels + s) * p.heads + pair % p.heads) * D;
    store_row(out, sum, int(D), 1.0f);
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

}  // namespace accel::ACCEL_ISA
