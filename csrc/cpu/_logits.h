// One tile of logits, queries × keys: biases and masks, and the gradients of biases. Shared by every kernel that weighs
// pairs.
#pragma once

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/_pair_rows.h"
#include "cpu/_pairs.h"
#include "cpu/_philox.h"
#include "cpu/_table.h"

namespace accel::ACCEL_ISA::pairs {

using namespace accel::pairs;

constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr float LEAST = std::numeric_limits<float>::lowest();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

// tanh, relative error below 4e-7.
inline vf tanh(vf x) {
  const vf sign = reinterpret_cast<vf>(reinterpret_cast<vi>(x) & int32_t(0x80000000));
  const vf a = reinterpret_cast<vf>(reinterpret_cast<vi>(x) & 0x7fffffff);
  const vf e = exp2_nonpositive(a * (-2.0f * LOG2_E));
  const vf large = (1.0f - e) / (1.0f + e);
  const vf s = a * a;  // near 0 that difference loses digits: the Taylor series, whose next term is below 2e-7
  vf p = splat(-1382.0f / 155925.0f);
  p = p * s + 62.0f / 2835.0f;
  p = p * s - 17.0f / 315.0f;
  p = p * s + 2.0f / 15.0f;
  p = p * s - 1.0f / 3.0f;
  const vf small = a + a * s * p;
  const vf y = a < 0.45f ? small : large;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(y) | reinterpret_cast<vi>(sign));
}

inline vf in_units(vf x, float unit) { return max(x * unit, min(x, splat(LEAST))); }

inline vi lanes() {
  vi x;
  for (int i = 0; i < W; ++i) x[i] = i;
  return x;
}

// Where a tile meets a block of keys: columns [from, to) of the block in whole vectors, of which some row sees
// [live_from, live_to) and every row [shared_from, shared_to).
struct Span {
  int from, to, live_from, live_to, shared_from, shared_to;
  bool whole;  // every row sees every column
  bool empty() const { return live_from >= live_to; }
};

inline Span meet(const Tile& tile, int64_t block, int count) {
  const int first = int(block), end = int(block) + count;
  Span s{0, 0, count, 0, 0, 0, false};
  for (int i = 0; i < 2; ++i) {
    const int a = std::max(tile.first[i], first), b = std::min(tile.end[i], end);
    if (a >= b) continue;
    s.live_from = std::min(s.live_from, a - first);
    s.live_to = std::max(s.live_to, b - first);
  }
  if (s.empty()) return s;
  s.from = s.live_from / W * W;
  s.to = vectors(s.live_to);
  for (int i = 0; i < 2; ++i) {  // the wider of the two parts that all rows see
    const int a = std::max(vectors(tile.all_first[i] - first), s.from), b = std::min((tile.all_end[i] - first) / W * W, s.to);
    if (b - a > s.shared_to - s.shared_from) s.shared_from = a, s.shared_to = b;
  }
  if (s.shared_from == s.shared_to) s.shared_from = s.shared_to = s.from;
  s.whole = s.shared_from == s.from && s.shared_to == s.to;
  return s;
}

// Where one query's keys lie.
struct Seen {
  int first0, end0, first1, end1, shift;
};

// The logits of tiles, in their unit.
class Logits {
 public:
  explicit Logits(const PairParams& p)
      : p(p),
        ld(spread(BLOCK_KEYS)),
        own_(int64_t(TILE_ROWS) * ld),
        x(own_),
        unit(p.softcap > 0.0f ? 1.0f : p.unit),
        filled_(p.bias || p.table),
        factor_(p.softcap > 0.0f ? p.scale : p.scale * p.unit),
        init_(filled_ ? int64_t(TILE_ROWS) * ld : 0),
        slope_(p.softcap > 0.0f ? int64_t(TILE_ROWS) * ld : 0) {}

  Seen seen(int64_t b, int64_t i) const {
    if (!p.rows) return {0, int(p.keys), 0, 0, int(i + p.keys - 1)};
    const int32_t* r = p.rows + b * p.rows_batch + i * 5;
    return {r[0], r[1], r[2], r[3], r[4]};
  }

  // What q·k is multiplied by before a bias is added: queries in fp32 take it when they are packed.
  float factor() const { return factor_; }

  // x = logits of the tile's queries (packed rows from q on) and the span's keys; −∞ where a query may not see a key.
  template <bool PAIRS>
  void compute(const Rows<PAIRS>& q, int64_t q_row, const Rows<PAIRS>& k, const float* k_t, int k_ld, int64_t b,
               int64_t h, const Tile& tile, int64_t block, const Span& s) {
    const Init init = find_init(b, h, tile, block, s);
    const float* add = capped() ? nullptr : init.at;
    gemm<PAIRS>({q.at(q_row), q.ld, 1, k_t + s.from, k_ld, x + s.from, ld, add, init.ld, q.words, factor_}, tile.count,
                (s.to - s.from) / W);
    if (q.any_bad() || k.any_bad()) spoil(q, q_row, k, tile.count, s);
    finish(b, h, tile, block, s, init);
  }

  // The same for a few queries, where packing the keys would cost more than the products.
  template <typename T>
  void compute_few(const Rows<>& q, int64_t q_row, int64_t kv, int64_t b, int64_t h, const Tile& tile, int64_t block,
                   const Span& s) {
    const Init init = find_init(b, h, tile, block, s);
    const bool add = init.at && !capped();
    for (int i = 0; i < tile.count; ++i) {
      float* row = x + int64_t(i) * ld;
      std::fill(row + s.from, row + s.to, 0.0f);
      const T* keys = row_of<T>(p.k, b, kv, block);
      for (int j = s.live_from; j < s.live_to; ++j) {
        const float product = q.bad(q_row + i) ? NOT_A_NUMBER : dot(q.at(q_row + i), keys + j * p.k.token);
        // of a key that is not finite −∞ may be left, which must not hide it
        row[j] = (std::isfinite(product) ? product : NOT_A_NUMBER) + (add ? init.at[i * init.ld + j - s.from] : 0.0f);
      }
    }
    finish(b, h, tile, block, s, init);
  }

  // Pairs that may see a row of `keys` or `queries` that was not finite; call it before weights replace the logits.
  // Of either it asks bad(row) and any_bad() alone.
  template <typename Queries, typename Keys>
  void find_spoiled(const Queries* queries, int64_t q_row, const Keys& keys, int count, const Span& s) {
    spoiled_.clear();
    if (!keys.any_bad() && !(queries && queries->any_bad())) return;
    for (int i = 0; i < count; ++i)
      for (int j = s.from; j < s.to; ++j)
        if ((keys.bad(j) || (queries && queries->bad(q_row + i))) && !(x[int64_t(i) * ld + j] == NEG_INF))
          spoiled_.push_back(int64_t(i) * ld + j);
  }
  bool any_spoiled() const { return !spoiled_.empty(); }
  const std::vector<int64_t>& spoiled() const { return spoiled_; }
  void spoil_pairs(float* tile) const {
    for (int64_t at : spoiled_) tile[at] = NOT_A_NUMBER;
  }

  // d logit / d (q·k) of the tile's pair, where there is a softcap.
  const float* slope() const { return slope_; }

  float keep(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const uint64_t position = ((uint64_t(b) * p.heads + h) * p.queries + i) * p.keys + j;
    return philox(p.seed, position) >= p.drop_below ? p.keep_scale : 0.0f;
  }

  // The first query's place in its line, such that key j is at + j; the next query's is one less.
  int64_t line_offset(int64_t b, const Tile& tile) const { return p.line_length - 1 - seen(b, tile.query).shift; }

  const PairParams& p;
  const int ld;

 private:
  Buffer own_;

 public:
  float* x;  // the tile, which may be put elsewhere

 private:
  bool capped() const { return p.softcap > 0.0f; }

  // The bias of a tile, its first row at column s.from; null where there is none.
  struct Init {
    const float* at = nullptr;
    int64_t ld = 0;
  };
  Init find_init(int64_t b, int64_t h, const Tile& tile, int64_t block, const Span& s) {
    if (filled_) {
      fill_bias(b, h, tile, block, s);
      return {init_ + s.from, ld};
    }
    if (p.line) return {line_of(b, h, tile) + block + s.from, -1};
    return {};
  }

  void finish(int64_t b, int64_t h, const Tile& tile, int64_t block, const Span& s, const Init& init) {
    if (capped()) cap(tile.count, s, init.at, init.ld);
    if (!s.whole) apply_rules(b, tile, block, s);
    if (p.mask) apply_mask(b, h, tile, block, s);
  }

  template <typename T>
  float dot(const float* q, const T* k) const {
    vf sum{};
    int d = 0;
    for (; d + W <= p.head_dim; d += W) sum += load(q + d) * load(k + d);
    float total = sum_lanes(sum)[0];
    for (; d < p.head_dim; ++d) total += q[d] * to_float(k[d]);
    return total;
  }

  const float* line_of(int64_t b, int64_t h, const Tile& tile) const {
    return p.line + h * p.line_stride + line_offset(b, tile);
  }

  void fill_bias(int64_t b, int64_t h, const Tile& tile, int64_t block, const Span& s) {
    const int to = int(std::min<int64_t>(s.to, p.keys - block));
    for (int i = 0; i < tile.count; ++i) {
      float* row = init_ + int64_t(i) * ld;
      if (p.line) {
        const float* line = line_of(b, h, tile) + block - i;
        for (int j = s.from; j < s.to; j += W) store(row + j, load(line + j));
      } else if (p.bias || !p.index) {
        std::fill(row + s.from, row + s.to, 0.0f);
      } else {
        std::fill(row + to, row + s.to, 0.0f);
      }
      if (p.bias) {
        const float* src = p.bias + b * p.bias_stride[0] + h * p.bias_stride[1] + (tile.query + i) * p.bias_stride[2] +
                           block * p.bias_stride[3];
        if (p.bias_stride[3] == 1) {
          int j = s.from;
          for (; j + W <= to; j += W) store(row + j, load(row + j) + in_units(load(src + j), unit));
          for (; j < to; ++j) row[j] += in_unit(src[j], unit);
        } else {
          for (int j = s.from; j < to; ++j) row[j] += in_unit(src[j * p.bias_stride[3]], unit);
        }
      }
      if (p.table) add_table(h, tile.query + i, block, s.from, to, row);
    }
  }

  void add_table(int64_t h, int64_t i, int64_t block, int from, int to, float* row) const {
    const float* column = p.table + h * p.table_rows;
    if (p.index) {
      const float* __restrict source = column;
      float* __restrict sum = row;
      int32_t narrow[BLOCK_KEYS];
      const int32_t* __restrict at = index_of(i, block, from, to, narrow);
      if (p.line || p.bias) {
        for (int j = from; j < to; ++j) sum[j] += source[at[j]];
      } else {
        for (int j = from; j < to; ++j) sum[j] = source[at[j]];
      }
      return;
    }
    for_each_grid_line(i, block + from, block + to, [&](int64_t j, int64_t turned, int64_t count, int64_t step) {
      float* dst = row + (j - block);
      const float* src = column + turned;
      for (int64_t n = 0; n < count; ++n) dst[n] += src[n * step];
    });
  }

  void cap(int count, const Span& s, const float* init, int64_t init_ld) {
    const float inverse = 1.0f / p.softcap;
    for (int i = 0; i < count; ++i) {
      float* row = x + int64_t(i) * ld;
      float* slope = slope_ + int64_t(i) * ld;
      const float* add = init ? init - s.from + i * init_ld : nullptr;
      for (int j = s.from; j < s.to; j += W) {
        const vf t = tanh(load(row + j) * inverse);
        vf y = t * p.softcap;
        if (add) y += load(add + j);
        store(row + j, in_units(y, p.unit));
        store(slope + j, 1.0f - t * t);
      }
    }
  }

  void apply_rules(int64_t b, const Tile& tile, int64_t block, const Span& s) {
    const vf none = splat(NEG_INF);
    for (int i = 0; i < tile.count; ++i) {
      const Seen r = seen(b, tile.query + i);
      const int first = int(block) + s.from, end = int(block) + s.to;
      if ((r.first0 <= first && end <= r.end0) || (r.first1 <= first && end <= r.end1)) continue;
      float* row = x + int64_t(i) * ld;
      const auto restrict_to = [&](int from, int to) {
        for (int j = from; j < to; j += W) {
          const vi at = lanes() + int(block + j);
          const vi in = ((at >= r.first0) & (at < r.end0)) | ((at >= r.first1) & (at < r.end1));
          store(row + j, in ? load(row + j) : none);
        }
      };
      restrict_to(s.from, s.shared_from);
      restrict_to(s.shared_to, s.to);
    }
  }

  void apply_mask(int64_t b, int64_t h, const Tile& tile, int64_t block, const Span& s) {
    const int to = int(std::min<int64_t>(s.to, p.keys - block));
    for (int i = 0; i < tile.count; ++i) {
      const uint8_t* src = p.mask + b * p.mask_stride[0] + h * p.mask_stride[1] + (tile.query + i) * p.mask_stride[2] +
                           block * p.mask_stride[3];
      float* row = x + int64_t(i) * ld;
      for (int j = s.from; j < to; ++j) row[j] = src[j * p.mask_stride[3]] ? row[j] : NEG_INF;
    }
  }

  template <bool PAIRS>
  void spoil(const Rows<PAIRS>& q, int64_t q_row, const Rows<PAIRS>& k, int count, const Span& s) {
    for (int i = 0; i < count; ++i)
      for (int j = s.from; j < s.to; ++j)
        if (q.bad(q_row + i) || k.bad(j)) x[int64_t(i) * ld + j] = NOT_A_NUMBER;
  }

 public:
  // The index of query i and keys [from, to) of a block; a wide one is copied to `narrow`, since half as many fit into a
  // vector. Rows are too short for the hardware to foresee the next one.
  const int32_t* index_of(int64_t i, int64_t block, int from, int to, int32_t* narrow) const {
    const int64_t at = i * p.keys + block, next = i + 1 < p.queries ? p.keys : 0;
    if (!p.wide_index) {
      const int32_t* index = static_cast<const int32_t*>(p.index) + at;
      for (int j = from; j < to; j += 16) __builtin_prefetch(index + next + j);
      return index;
    }
    const int64_t* wide = static_cast<const int64_t*>(p.index) + at;
    for (int j = from; j < to; j += 8) __builtin_prefetch(wide + next + j);
    for (int j = from; j < to; ++j) narrow[j] = int32_t(wide[j]);
    return narrow;
  }

  // f(first key, offset of its row in a turned column of the table, keys, step of the offset) along query i.
  template <typename F>
  void for_each_grid_line(int64_t i, int64_t from, int64_t to, F f) const {
    const TableIndex table(p.grid);
    const int64_t special = table.rows(), last = p.table_rows - 1;
    if (from < p.extra) {
      const int64_t end = std::min(to, p.extra);
      f(from, last - (i < p.extra ? special + 2 : special + 1), end - from, 0);
      from = end;
    }
    if (from >= to) return;
    if (i < p.extra) return f(from, last - special, to - from, 0);
    table.for_each_line(i - p.extra, from - p.extra, to - p.extra,
                        [&](int64_t j, int64_t row, int64_t count) { f(j + p.extra, last - row, count, 1); });
  }

 private:
  const float unit;
  const bool filled_;
  const float factor_;
  Buffer init_;   // bias of the tile
  Buffer slope_;  // 1 − tanh²
  std::vector<int64_t> spoiled_;
};

// The gradients of biases of one backward task, from those of its logits.
class BiasSums {
 public:
  BiasSums(const PairParams& p, const PairSums& b, const Logits& logits) : p(p), b(b), logits(logits) {}

  // Of part `part` of the sums, query heads [from, to).
  void begin(int64_t part, int64_t from, int64_t to) {
    part_ = part;
    for (int64_t h = from; h < to; ++h) {
      if (b.part_line) std::fill_n(line_part(h), p.line_length, 0.0f);
      if (b.part_table) std::fill_n(table_part(h), p.table_rows, 0.0f);
    }
  }

  // `grad` is laid out as the tile's logits, with row stride ld.
  void add(int64_t batch, int64_t h, const Tile& tile, int64_t first, const Span& s, const float* grad, int ld) {
    if (b.part_line) add_line(batch, h, tile, first, s, grad, ld);
    if (b.part_table) add_table(h, tile, first, s, grad, ld);
    if (b.grad_bias) add_bias(batch, h, tile, first, s, grad, ld);
  }

 private:
  float* line_part(int64_t h) const { return b.part_line + (part_ * p.heads + h) * p.line_length; }
  float* table_part(int64_t h) const { return b.part_table + (part_ * p.heads + h) * p.table_rows; }

  // Columns that are keys: what lies behind them in the last vector is no pair.
  int real(int64_t first, const Span& s) const { return int(std::min<int64_t>(s.to, p.keys - first)); }

  void add_line(int64_t batch, int64_t h, const Tile& tile, int64_t first, const Span& s, const float* grad, int ld) {
    // Only between the first and the last key that some row sees is every pair's place within the line.
    const int64_t offset = logits.line_offset(batch, tile) + first;
    for (int i = 0; i < tile.count; ++i) {
      float* dst = line_part(h) + offset - i;
      const float* src = grad + int64_t(i) * ld;
      int j = std::max<int64_t>(s.live_from, i - offset);
      const int end = int(std::min<int64_t>(s.live_to, p.line_length - offset + i));
      for (; j + W <= end; j += W) store(dst + j, load(dst + j) + load(src + j));
      for (; j < end; ++j) dst[j] += src[j];
    }
  }

  void add_table(int64_t h, const Tile& tile, int64_t first, const Span& s, const float* grad, int ld) {
    float* dst = table_part(h);
    const int end = real(first, s);
    for (int i = 0; i < tile.count; ++i) {
      const float* src = grad + int64_t(i) * ld;
      if (p.index) {
        int32_t narrow[BLOCK_KEYS];
        const int32_t* at = logits.index_of(tile.query + i, first, s.from, end, narrow);
        for (int j = s.from; j < end; ++j) dst[at[j]] += src[j];
      } else {
        logits.for_each_grid_line(tile.query + i, first + s.from, first + end,
                                  [&](int64_t j, int64_t turned, int64_t count, int64_t step) {
                                    const float* from = src + (j - first);
                                    for (int64_t m = 0; m < count; ++m) dst[turned + m * step] += from[m];
                                  });
      }
    }
  }

  void add_bias(int64_t batch, int64_t h, const Tile& tile, int64_t first, const Span& s, const float* grad, int ld) {
    const int end = real(first, s);
    for (int i = 0; i < tile.count; ++i) {
      const int64_t at = batch * b.grad_bias_stride[0] + h * b.grad_bias_stride[1] +
                         (tile.query + i) * b.grad_bias_stride[2] + first * b.grad_bias_stride[3];
      float* dst = b.grad_bias + at;
      const float* src = grad + int64_t(i) * ld;
      const int64_t step = b.grad_bias_stride[3];
      for (int j = s.from; j < end; ++j) dst[j * step] += src[j];
    }
  }

  const PairParams& p;
  const PairSums& b;
  const Logits& logits;
  int64_t part_ = 0;
};

// grad_q of heads [from, to) of the batch = Σ over runs of keys, in their order.
template <typename T>
void sum_queries(const PairParams& p, const PairSums& b, const Strided& grad_q, int64_t from, int64_t to) {
  const int64_t run = p.batch * p.heads * p.queries * p.head_dim;
  std::vector<float> row(size_t(vectors(p.head_dim)));
  for (int64_t head = from; head < to; ++head)
    for (int64_t i = 0; i < p.queries; ++i) {
      const float* src = b.part_q + (head * p.queries + i) * p.head_dim;
      for (int d = 0; d < p.head_dim; ++d) {
        float sum = src[d];
        for (int64_t r = 1; r < b.key_runs; ++r) sum += src[r * run + d];
        row[size_t(d)] = sum;
      }
      store_row(const_cast<T*>(row_of<T>(grad_q, head / p.heads, head % p.heads, i)), row.data(), p.head_dim, 1.0f);
    }
}

}  // namespace accel::ACCEL_ISA::pairs
