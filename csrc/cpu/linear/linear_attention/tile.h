// A chunk of tokens of one head and what every pass over chunks does with it.
#pragma once

#include "rows.h"

#include <vector>

namespace accel::ACCEL_ISA::linear {

constexpr int ROWS = 16;  // of a chunk, multiplied with what comes before their end; a multiple of every W

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
template <bool PAIRS>
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
        weights(CHUNK * ld),
        left_(CHUNK, CHUNK),
        turned_(CHUNK, CHUNK) {}

  // `next` is where the chunk after this one begins, or below 0 where there is none.
  void load_keys(int64_t b, int64_t hs, int64_t first, int count, int64_t next) {
    const auto shown = [&](int i) { return !hidden(b, first + i); };
    const auto one = [](int) { return 1.0f; };
    pack(k, p.map, p.k, b, hs, first, count, shown, one);
    pack(v, Map::identity, p.v, b, hs, first, count, shown, one);
    fetch_rows(p.k, b, hs, next, p.keys, p.features), fetch_rows(p.v, b, hs, next, p.keys, p.values);
    k.round(count, true), v.round(count, false);  // values are bf16 already
    decay.begin(b, hs, first, count);
    if (decay.any()) shrunk(k, decay.to_end, late_k, count);
  }

  // to = rows of x, each times a number.
  static void shrunk(const Rows<PAIRS>& x, const float* mul, Rows<PAIRS>& to, int count) {
    for (int i = 0; i < count; ++i)
      for (int d = 0; d < x.padded; d += W) store(to.at(i) + d, load(x.at(i) + d) * mul[i]);
    for (int i = count; i < vectors(count); ++i) to.clear(i);
    to.round(count, true);
  }

  // rows = mul(i) · map of tokens of x where shown(i), else zeros.
  template <typename Shown, typename Factor>
  void pack(Rows<PAIRS>& rows, Map map, const Strided& x, int64_t b, int64_t h, int64_t first, int count, Shown shown,
            Factor mul) const {
    with_type<PAIRS>(p.dtype, [&](auto of) {
      const auto* source = row_of<decltype(of)>(x, b, h, first);
      with_map(map, [&](auto f) {
        rows.pack(f, count, [&](int i) { return shown(i) ? source + i * x.token : nullptr; }, mul);
      });
    });
  }

  // Starts to read the chunk of tokens from `first` on, of which there are `tokens`: while another is computed.
  void fetch_rows(const Strided& x, int64_t b, int64_t h, int64_t first, int64_t tokens, int size) const {
    if (first < 0) return;
    const int64_t item = p.dtype == Dtype::f32 ? 4 : 2;
    const char* at = static_cast<const char*>(x.data) + (b * x.batch + h / x.share * x.head + first * x.token) * item;
    const int64_t count = std::min<int64_t>(CHUNK, tokens - first);
    for (int64_t i = 0; i < count; ++i) fetch(at + i * x.token * item, size * item);
  }

  void put(const Strided& to, int64_t b, int64_t h, int64_t t, const float* from, int n, float mul) const {
    with_type<PAIRS>(p.dtype, [&](auto of) { store_row(row_of<decltype(of)>(to, b, h, t), from, n, mul); });
  }

  bool hidden(int64_t b, int64_t t) const { return p.key_mask && !p.key_mask[b * p.keys + t]; }

  // Keys as what comes after the chunk sees them.
  Rows<PAIRS>& keys_at_end() { return decay.any() ? late_k : k; }
  int first_bad_key() const { return std::min(k.first_bad(), v.first_bad()); }

  void load_queries(int64_t b, int64_t h, int64_t first, int count, int64_t next) {
    pack(q, p.map, p.q, b, h, first, count, [](int) { return true; }, [&](int) { return p.scale; });
    fetch_rows(p.q, b, h, next, p.queries, p.features);
    q.round(count, p.causal);
  }

  // out (count × columns of the turned b) = a · b, of each row up to the end of its block of ROWS.
  void lower(const Rows<PAIRS>& a, const float* b_t, float* out, int count) const {
    const Words<PAIRS>& x = a.words();
    for (int r = 0; r < count; r += ROWS) {
      const int rows = std::min(ROWS, count - r);
      gemm<PAIRS>({x.at(r), x.ld, 1, b_t, ld, out + r * ld, ld, nullptr, 0, x.words}, rows, vectors(r + rows) / W);
    }
  }

  // out += x · b for x as lower() makes it, zero behind the diagonal.
  void add_lower(const float* x, Rows<PAIRS>& b, Words<>& out, int count) {
    if constexpr (!PAIRS) return add_lower_exact(x, b, out, count);
    left_.begin(0);
    for (int i = 0; i < count; ++i) left_.fill_row(i, 0, filled(i), [&](int j) { return load(x + i * ld + j); });
    for (int r = 0; r < count; r += ROWS) {
      const int rows = std::min(ROWS, count - r);
      Gemm g = left_.times(b.summed(count), 0, r + rows, out.at(r), out.ld, out.at(r));
      g.a += r * g.row_a;
      gemm<PAIRS>(g, rows, out.padded / W);
    }
  }

  // The same with x that is not rounded.
  void add_lower_exact(const float* x, const Rows<PAIRS>& b, Words<>& out, int count) const {
    for (int r = 0; r < count; r += ROWS) {
      const int rows = std::min(ROWS, count - r);
      gemm({x + r * ld, ld, 1, b.at(0), b.ld, out.at(r), out.ld, out.at(r), out.ld, r + rows}, rows, out.padded / W);
    }
  }

  // out += xᵀ · b.
  void add_upper(const float* x, Rows<PAIRS>& b, Words<>& out, int count) {
    if constexpr (PAIRS) {
      turned_.begin(count, 0);
      for (int i = 0; i < count; i += 2)
        for (int j = 0; j < filled(i); j += W)
          turned_.put(i, j, load(x + i * ld + j), i + 1 < count ? load(x + (i + 1) * ld + j) : vf{});
    } else {
      turned_.take(x, ld, count, 0, count);
    }
    for (int r = 0; r < count; r += ROWS) {
      const int rows = std::min(ROWS, count - r), before = PAIRS ? r / 2 : r;
      Gemm g = turned_.times(b.summed(count), out.at(r), out.ld, out.at(r));
      g.a += before * g.col_a + r;
      g.b += before * g.ldb;
      g.K -= before;
      gemm<PAIRS>(g, rows, out.padded / W);
    }
  }

  // Columns of row i of a product that are made, or zeros.
  static int filled(int i) { return int(round_up(i + 1, ROWS)); }

  // x = decay · (x + add_i) on and before the diagonal, 0 behind it; row(i, sum) gets the sum of each.
  template <typename F>
  void decayed(float* x, int count, const float* add, F row) const {
    for (int i = 0; i < count; ++i) {
      float* w = x + i * ld;
      const int end = int(round_up(i + 1, W));
      vf sum{};
      for (int j = 0; j < end; j += W) {
        vf y = load(w + j);
        if (add) y += add[i];
        if (decay.any()) y *= load(decay.between(i) + j);
        if (j + W > i + 1) y = lanes() + j <= i ? y : vf{};
        store(w + j, y);
        sum += y;
      }
      for (int j = end; j < filled(i); j += W) store(w + j, vf{});
      row(i, sum_lanes(sum)[0]);
    }
  }

  static vi lanes() {
    vi x;
    for (int i = 0; i < W; ++i) x[i] = i;
    return x;
  }

  // rows (count × F or E) = a (count × K) · state (K rows), or what else is a product's second operand.
  static void cross(const Rows<PAIRS>& a, const float* state, int state_ld, Words<>& out, int count) {
    const Words<PAIRS>& x = a.words();
    gemm<PAIRS>({x.at(0), x.ld, 1, state, state_ld, out.at(0), out.ld, nullptr, 0, x.words}, count, out.padded / W);
  }

  // The same with a state that is not rounded.
  static void cross_exact(const Rows<PAIRS>& a, const float* state, int state_ld, Words<>& out, int count) {
    gemm({a.at(0), a.ld, 1, state, state_ld, out.at(0), out.ld, nullptr, 0, a.size}, count, out.padded / W);
  }

  // state += aᵀ · b, over `count` tokens.
  static void accumulate(Rows<PAIRS>& a, Rows<PAIRS>& b, Words<>& state, int count) {
    const Summed<PAIRS>&x = a.summed(count), &y = b.summed(count);
    gemm<PAIRS>({x.at(0), 1, x.ld, y.at(0), y.ld, state.at(0), state.ld, state.at(0), state.ld,
                 PAIRS ? (count + 1) / 2 : count},
                a.size, state.padded / W);
  }

  // sum += the rows of a, each times a number; first among themselves, since the sum may be of many more.
  static void add_rows(const Rows<PAIRS>& a, const float* mul, float* sum, int count) {
    for (int d = 0; d < a.padded; d += W) {
      vf added{};
      for (int i = 0; i < count; ++i) added += load(a.at(i) + d) * (mul ? mul[i] : 1.0f);
      store(sum + d, load(sum + d) + added);
    }
  }

  static void scale_rows(Words<>& x, const float* mul, int count) {
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
  Rows<PAIRS> q, k, v, late_k;
  const int ld;  // of the rows of products
  Buffer weights;

 private:
  Weights<PAIRS> left_;
  TurnedWeights<PAIRS> turned_;
};

// Sums that are carried along a sequence: rows × columns, and one for the denominator.
template <bool PAIRS>
class State {
 public:
  State(int rows, int columns, int sums)
      : main(vectors(rows), columns),
        rows(rows),
        columns(columns),
        sum(vectors(sums)),
        sums(sums),
        second_ld(PAIRS ? spread(columns) : main.ld),
        mated_(PAIRS ? (rows + 1) / 2 * second_ld : 0),
        rounded_(PAIRS ? vectors(rows) : 0, columns) {}

  // `main` as a product's second operand, as it is now.
  const float* second() {
    if constexpr (!PAIRS) return main.at(0);
    for (int i = 0; i < rows; i += 2)
      for (int d = 0; d < main.padded; d += W)
        store_mated(mated_ + i / 2 * second_ld + d, load(main.at(i) + d), load(main.at(i + 1) + d));
    return mated_;
  }

  // to = that of `main` turned round.
  void turn(float* to, int to_ld) {
    if constexpr (PAIRS) {
      for (int i = 0; i < vectors(rows); ++i)
        for (int d = 0; d < main.padded; d += 2 * W) {
          const float* at = main.at(i) + d;
          store_halves(rounded_.at(i) + d / 2, load(at), d + W < main.padded ? load(at + W) : vf{});
        }
      transpose(rounded_.at(0), rounded_.ld, to, to_ld, vectors(rows), rounded_.padded);
    } else {
      transpose(main.at(0), main.ld, to, to_ld, vectors(rows), main.padded);
    }
  }

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
  const int sums, second_ld;

 private:
  Buffer mated_;
  Words<PAIRS> rounded_;
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
template <bool PAIRS>
bool begin_state(const Params& p, const Segment& s, int64_t hs, State<PAIRS>& state, bool turned) {
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
