// A chunk of tokens of one head, packed in fp32, and what every pass over chunks does with it.
//
// What is not finite is replaced by zero in the operands and remembered, since 0 · NaN would carry it to queries that
// may not see it; the rows that see it are made NaN when they are stored.
#pragma once

#include "maps.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/_pack.h"

namespace accel::ACCEL_ISA::linear {

using namespace accel::linear_attention;

constexpr int CHUNK = 64;
constexpr int ROWS = 16;  // of a chunk, multiplied with what comes before their end; a multiple of every W
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

template <typename T>
T* row_of(const Strided& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(x.data) + b * x.batch + h / x.share * x.head + t * x.token;
}

// Only what reads and writes rows is made for each dtype; in between all is fp32.
template <typename F>
inline void with_type(Dtype dtype, F f) {
  if (dtype == Dtype::f32) f(float{});
  if (dtype == Dtype::bf16) f(bf16{});
  if (dtype == Dtype::f16) f(fp16{});
}

// Rows of a chunk, with a note of those that held something not finite.
class Rows : public Words<> {
 public:
  explicit Rows(int size) : Words<>(CHUNK, size) {}

  void begin() { std::fill_n(bad_, CHUNK, false); }

  // Row `row` = mul · map(src), zeros behind it.
  template <typename M, typename T>
  void pack(M, int row, const T* src, float mul) {
    float* dst = at(row);
    vf check{};  // 0 · x is NaN for what is not finite
    int d = 0;
    for (; d + W <= size; d += W) {
      const vf x = M::value(load(src + d));
      check += x * 0.0f;
      store(dst + d, x * mul);
    }
    if (d < size) {
      float tail[W];
      load_row(src + d, tail, size - d, W);
      store(tail, M::value(load(tail)));
      for (int i = 0; i < W; ++i) dst[d + i] = d + i < size ? tail[i] * mul : 0.0f;
      check += load(dst + d) * 0.0f;
      d += W;
    }
    for (; d < padded; d += W) store(dst + d, vf{});
    if (!(sum_lanes(check)[0] == 0.0f)) spoil(row);
  }

  // What is not finite in a row counts as zero from now on.
  void spoil(int row) {
    bad_[row] = true;
    for (int d = 0; d < padded; ++d)
      if (!std::isfinite(at(row)[d])) at(row)[d] = 0.0f;
  }

  bool bad(int row) const { return bad_[row]; }
  int first_bad() const { return int(std::find(bad_, bad_ + CHUNK, true) - bad_); }

  using Words<>::size;

 private:
  bool bad_[CHUNK] = {};
};

// Factors of a chunk's pairs by log_decay.
class Decay {
 public:
  explicit Decay(const Params& p) : p(p), ld(spread(CHUNK)), between_(p.decay && p.causal ? CHUNK * ld : 0) {}

  bool any() const { return p.decay && p.causal; }

  // For the tokens from `first` on. What is the same for all of a head is made once.
  void begin(int64_t b, int64_t hs, int64_t first, int count) {
    if (!any()) return;
    const float* decay = p.decay + b * p.decay_batch + hs * p.decay_head + first * p.decay_token;
    double total = 0.0;
    double sums[CHUNK];
    for (int i = 0; i < count; ++i) sums[i] = total += double(decay[i * p.decay_token]);
    for (int i = 0; i < count; ++i) {
      from_start[i] = float(std::exp(sums[i]));
      to_end[i] = float(std::exp(total - sums[i]));
    }
    whole = float(std::exp(total));
    const bool same = p.decay_token == 0 && known_ == hs;
    if (same) return;
    known_ = p.decay_token == 0 ? hs : -1;
    if (p.decay_token == 0)
      for (int i = 0; i < CHUNK; ++i) sums[i] = double(*decay) * (i + 1);
    // a sum in two parts, so that a difference keeps the small beside the large
    const int rows = p.decay_token == 0 ? CHUNK : count, padded = vectors(rows);
    float high[CHUNK] = {}, low[CHUNK] = {};
    for (int i = 0; i < rows; ++i) {
      high[i] = float(sums[i]);
      low[i] = float(sums[i] - double(high[i]));
    }
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < std::min(padded, int(round_up(i + 1, ROWS))); j += W) {
        const vf past = (high[i] - load(high + j)) + (low[i] - load(low + j));
        store(between_ + i * ld + j, exp2_nonpositive(min(past * LOG2_E, vf{})));
      }
  }

  // What token i keeps of each before it, up to the end of its block of ROWS; behind itself any number up to 1.
  const float* between(int i) const { return between_ + i * ld; }

  // Of what was before the chunk at each token, of each token at the end of the chunk, and of the one at the other.
  float from_start[CHUNK], to_end[CHUNK], whole = 1.0f;

 private:
  const Params& p;
  const int ld;
  Buffer between_;
  int64_t known_ = -1;
};

// What all passes hold: a chunk's keys and values, its queries, their products, and sums that are carried from chunk to
// chunk.
class Tile {
 public:
  explicit Tile(const Params& p)
      : p(p),
        group(p.heads / p.state_heads),
        decay(p),
        q(p.features),
        k(p.features),
        v(p.values),
        late_k(decay.any() ? p.features : 0),
        ld(spread(CHUNK)),
        weights(CHUNK * ld) {}

  void load_keys(int64_t b, int64_t hs, int64_t first, int count) {
    k.begin(), v.begin();
    for (int i = 0; i < count; ++i) {
      if (hidden(b, first + i)) {
        k.clear(i), v.clear(i);
        continue;
      }
      pack(k, i, p.map, p.k, b, hs, first + i, 1.0f);
      pack(v, i, Map::identity, p.v, b, hs, first + i, 1.0f);
    }
    for (int i = count; i < vectors(count); ++i) k.clear(i), v.clear(i);
    decay.begin(b, hs, first, count);
    if (decay.any())
      for (int i = 0; i < count; ++i)
        for (int d = 0; d < k.padded; d += W) store(late_k.at(i) + d, load(k.at(i) + d) * decay.to_end[i]);
  }

  // Row `row` = mul · map of a token of x.
  void pack(Rows& rows, int row, Map map, const Strided& x, int64_t b, int64_t h, int64_t t, float mul) const {
    with_type(p.dtype, [&](auto of) {
      const auto* source = row_of<decltype(of)>(x, b, h, t);
      with_map(map, [&](auto f) { rows.pack(f, row, source, mul); });
    });
  }

  void put(const Strided& to, int64_t b, int64_t h, int64_t t, const float* from, int n, float mul) const {
    with_type(p.dtype, [&](auto of) { store_row(row_of<decltype(of)>(to, b, h, t), from, n, mul); });
  }

  bool hidden(int64_t b, int64_t t) const { return p.key_mask && !p.key_mask[b * p.keys + t]; }

  // Keys as what comes after the chunk sees them.
  const Rows& keys_at_end() const { return decay.any() ? late_k : k; }
  int first_bad_key() const { return std::min(k.first_bad(), v.first_bad()); }

  void load_queries(int64_t b, int64_t h, int64_t first, int count) {
    q.begin();
    for (int i = 0; i < count; ++i) pack(q, i, p.map, p.q, b, h, first + i, p.scale);
    for (int i = count; i < vectors(count); ++i) q.clear(i);
  }

  // out (count × columns of the turned b) = a · b, of each row up to the end of its block of ROWS.
  void lower(const Rows& a, const float* b_t, float* out, int count) const {
    for (int r = 0; r < count; r += ROWS) {
      const int rows = std::min(ROWS, count - r);
      gemm({a.at(r), a.ld, 1, b_t, ld, out + r * ld, ld, nullptr, 0, a.words}, rows, vectors(r + rows) / W);
    }
  }

  // out += x · b for x as lower() makes it, zero behind the diagonal.
  void add_lower(const float* x, const Rows& b, Rows& out, int count) const {
    for (int r = 0; r < count; r += ROWS) {
      const int rows = std::min(ROWS, count - r);
      gemm({x + r * ld, ld, 1, b.at(0), b.ld, out.at(r), out.ld, out.at(r), out.ld, r + rows}, rows, out.padded / W);
    }
  }

  // out += xᵀ · b.
  void add_upper(const float* x, const Rows& b, Rows& out, int count) const {
    for (int r = 0; r < count; r += ROWS) {
      const int rows = std::min(ROWS, count - r);
      gemm({x + r * ld + r, 1, ld, b.at(r), b.ld, out.at(r), out.ld, out.at(r), out.ld, count - r}, rows,
           out.padded / W);
    }
  }

  // x = decay · (x + add_i) on and before the diagonal, 0 behind it; row(i, sum) gets the sum of each.
  template <typename F>
  void decayed(float* x, int count, const float* add, F row) const {
    for (int i = 0; i < count; ++i) {
      float* w = x + i * ld;
      const int end = int(round_up(i + 1, W)), filled = int(round_up(i + 1, ROWS));
      vf sum{};
      for (int j = 0; j < end; j += W) {
        vf y = load(w + j);
        if (add) y += add[i];
        if (decay.any()) y *= load(decay.between(i) + j);
        if (j + W > i + 1) y = lanes() + j <= i ? y : vf{};
        store(w + j, y);
        sum += y;
      }
      for (int j = end; j < filled; j += W) store(w + j, vf{});
      row(i, sum_lanes(sum)[0]);
    }
  }

  static vi lanes() {
    vi x;
    for (int i = 0; i < W; ++i) x[i] = i;
    return x;
  }

  // rows (count × F or E) = a (count × K) · state (K rows).
  static void cross(const Rows& a, const Words<>& state, Rows& out, int count) {
    gemm({a.at(0), a.ld, 1, state.at(0), state.ld, out.at(0), out.ld, nullptr, 0, a.words}, count, out.padded / W);
  }

  // state += aᵀ · b, over `count` tokens.
  static void accumulate(const Rows& a, const Rows& b, Words<>& state, int count) {
    gemm({a.at(0), 1, a.ld, b.at(0), b.ld, state.at(0), state.ld, state.at(0), state.ld, count}, a.words,
         state.padded / W);
  }

  static void add_rows(const Rows& a, const float* mul, float* sum, int count) {
    for (int i = 0; i < count; ++i)
      for (int d = 0; d < a.padded; d += W) store(sum + d, load(sum + d) + load(a.at(i) + d) * (mul ? mul[i] : 1.0f));
  }

  static void scale_rows(Rows& x, const float* mul, int count) {
    for (int i = 0; i < count; ++i)
      for (int d = 0; d < x.padded; d += W) store(x.at(i) + d, load(x.at(i) + d) * mul[i]);
  }

  static float dot(const float* a, const float* b, int padded) {
    vf sum{};
    for (int d = 0; d < padded; d += W) sum += load(a + d) * load(b + d);
    return sum_lanes(sum)[0];
  }

  const Params& p;
  const int64_t group;  // output heads to a state head
  Decay decay;
  Rows q, k, v, late_k;
  const int ld;  // of the rows of products
  Buffer weights;
};

// Sums that are carried along a sequence: rows × columns, and one for the denominator.
class State {
 public:
  State(int rows, int columns, int sums)
      : main(vectors(rows), columns), rows(rows), columns(columns), sum(vectors(sums)), sums(sums) {}

  void clear() {
    for (int i = 0; i < vectors(rows); ++i) main.clear(i);  // a transposition reads whole vectors of rows
    std::fill_n(sum.data(), vectors(sums), 0.0f);
  }

  // main = `from`, rows × columns or, turned, columns × rows; either may be null.
  void read(const float* from, const float* sum_from, bool turned) {
    clear();
    if (from && !turned)
      for (int i = 0; i < rows; ++i) std::copy_n(from + int64_t(i) * columns, columns, main.at(i));
    if (from && turned)
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) main.at(i)[j] = from[int64_t(j) * rows + i];
    if (sum_from) std::copy_n(sum_from, sums, sum.data());
  }

  void write(float* to, float* sum_to) const {
    if (to)
      for (int i = 0; i < rows; ++i) std::copy_n(main.at(i), columns, to + int64_t(i) * columns);
    if (sum_to) std::copy_n(sum.data(), sums, sum_to);
  }

  void spoil() {
    for (int i = 0; i < rows; ++i) std::fill_n(main.at(i), columns, NOT_A_NUMBER);
    std::fill_n(sum.data(), sums, NOT_A_NUMBER);
  }

  void shrink(float by) {
    if (by == 1.0f) return;
    for (int i = 0; i < rows; ++i)
      for (int d = 0; d < main.padded; d += W) store(main.at(i) + d, load(main.at(i) + d) * by);
    for (int d = 0; d < vectors(sums); d += W) store(sum + d, load(sum + d) * by);
  }

  Words<> main;
  const int rows, columns;
  Buffer sum;
  const int sums;
};

// The place of a state among those of all slots and heads, and among those that the caller gives.
inline float* slot_of(const Params& p, const States& states, int64_t slot, int64_t hs) {
  return states.data + (slot * p.state_heads + hs) * (int64_t(p.features) * p.values + p.features);
}
template <typename F>
inline F* kv_of(const Params& p, F* kv, int64_t n, int64_t hs) {
  return kv ? kv + (n * p.state_heads + hs) * p.features * p.values : nullptr;
}
template <typename F>
inline F* sum_of(const Params& p, F* k_sum, int64_t n, int64_t hs) {
  return k_sum ? k_sum + (n * p.state_heads + hs) * p.features : nullptr;
}

// The state that the first queries of a run see, and whether it is lost.
inline bool begin_state(const Params& p, const Segment& s, int64_t hs, State& state, bool turned) {
  if (p.causal && s.first) {
    state.read(kv_of(p, p.kv, s.sequence, hs), sum_of(p, p.k_sum, s.sequence, hs), turned);
    return false;
  }
  const float* from = slot_of(p, p.states, s.slot, hs);
  state.read(from, from + int64_t(p.features) * p.values, turned);
  return p.states.lost[s.slot * p.state_heads + hs];
}

// exp of the decay over a run of tokens.
inline float decay_over(const Params& p, int64_t hs, const Segment& s) {
  if (!p.decay || !p.causal) return 1.0f;
  double total = 0.0;
  const float* decay = p.decay + s.batch * p.decay_batch + hs * p.decay_head;
  for (int64_t t = s.from; t < s.to; ++t) total += double(decay[t * p.decay_token]);
  return float(std::exp(total));
}

// What the sums of all runs begin with, and where they go; each may be null.
struct Ends {
  const float *kv, *k_sum;
  float *kv_out, *k_sum_out;
};

// The slots of a sequence and head hold what each run adds. In causal order each gets what the runs before it, or behind
// it where `backwards`, have added up to; without order the first gets the sum of all, which goes out as well.
inline void join_runs(const Params& p, const Segment* runs, const int64_t* firsts, const States& states,
                      const Ends& ends, int64_t task, bool backwards) {
  const int64_t n = task / p.state_heads, hs = task % p.state_heads, first = firsts[n], count = firsts[n + 1] - first;
  const int64_t main = int64_t(p.features) * p.values, size = main + p.features;
  std::vector<float> now(size_t(size), 0.0f);
  if (const float* kv = kv_of(p, ends.kv, n, hs)) std::copy_n(kv, main, now.data());
  if (const float* k_sum = sum_of(p, ends.k_sum, n, hs)) std::copy_n(k_sum, p.features, now.data() + main);
  bool lost = false;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = backwards ? first + count - 1 - i : first + i;
    float* at = slot_of(p, states, slot, hs);
    char& flag = states.lost[slot * p.state_heads + hs];
    if (!p.causal) {
      for (int64_t d = 0; d < size; ++d) now[size_t(d)] += at[d];
      lost |= bool(flag);
      continue;
    }
    const bool needed = i + 1 < count, added = needed && flag;  // the last one's own sum is made again, elsewhere
    const float shrink = decay_over(p, hs, runs[slot]);
    for (int64_t d = 0; d < size; ++d) {
      const float reached = now[size_t(d)];
      if (needed) now[size_t(d)] = reached * shrink + at[d];
      at[d] = reached;
    }
    flag = lost;
    lost |= added;
  }
  if (p.causal) return;
  std::copy_n(now.data(), size, slot_of(p, states, first, hs));
  states.lost[first * p.state_heads + hs] = lost;
  if (lost) std::fill(now.begin(), now.end(), NOT_A_NUMBER);
  if (float* out = kv_of(p, ends.kv_out, n, hs)) std::copy_n(now.data(), main, out);
  if (float* out = sum_of(p, ends.k_sum_out, n, hs)) std::copy_n(now.data() + main, p.features, out);
}

}  // namespace accel::ACCEL_ISA::linear
