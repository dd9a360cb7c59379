// Backward of a chunk, panel by panel of the values. With w the weights, s their slopes, g = dO ∘ gate, S the sum that the
// queries see and dS the gradient of that which the keys enter: dV = wᵀ·g + k'·dS, dk' = V·dSᵀ, dq' = g·Sᵀ, dx = s ∘ (g·Vᵀ),
// dK = dxᵀ·Q, dQ = dx·K; biases take dx.
#pragma once

#include "block.h"

namespace accel::ACCEL_ISA::flash {

constexpr int GROUP_KEYS = 64;  // whose sums begin with the same query

template <typename T>
class Backward : Block<T> {
  static constexpr bool PAIRS = IN_PAIRS<T>;
  using Base = Block<T>;
  using Base::bad_values, Base::c, Base::first_row, Base::id, Base::k, Base::k_t, Base::ld, Base::logits, Base::p,
      Base::pairs, Base::panels, Base::q, Base::rows, Base::size, Base::spans, Base::tiles, Base::v;

 public:
  explicit Backward(const BackwardParams& b)
      : Base(b.forward),
        b(b),
        biases(pairs, b, logits),
        columns(p.panel),
        exact(PAIRS && p.gate.data && (b.part_line || b.part_table || pairs.queries <= TILE_ROWS)),
        lin_k(BLOCK_KEYS, p.lin_dim),
        upstream(BLOCK_ROWS, columns),
        rest(exact ? BLOCK_ROWS : 0, columns),
        grad_state(p.lin_dim, columns),
        q_summed(BLOCK_ROWS, q),
        k_summed(BLOCK_KEYS, k),
        upstream_summed(BLOCK_ROWS, upstream),
        grad_state_summed(p.lin_dim, grad_state),
        states(p.states, panels, columns, p.lin_dim, p.state_parts),
        grad_states(b.grad_states, panels, p.lin_dim, columns),
        turned_weights(BLOCK_ROWS, BLOCK_KEYS),
        turned_grads(BLOCK_ROWS, BLOCK_KEYS),
        straight_grads(TILE_ROWS, BLOCK_KEYS),
        v_t(int64_t(v.padded) * ld),
        weights(int64_t(BLOCK_ROWS) * ld),
        slopes(int64_t(BLOCK_ROWS) * ld),
        grads(int64_t(BLOCK_ROWS) * ld),
        grad_lin_k_t(int64_t(vectors(p.lin_dim)) * ld),
        grad_q(pairs.queries, pairs.head_dim),
        grad_lin_q(pairs.queries, p.lin_dim),
        grad_k(BLOCK_KEYS, pairs.head_dim),
        grad_lin_k(BLOCK_KEYS, vectors(p.lin_dim)),
        grad_v(int64_t(Base::several ? panels : 1) * BLOCK_KEYS, columns),
        bad_upstream(BLOCK_ROWS),
        bad_queries(pairs.queries),
        bad_keys(BLOCK_KEYS) {}

  // A task is a chunk.
  void run(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      Base::enter(task);
      biases.begin(task, 0, 1);
      chunk();
    }
  }

 private:
  void chunk() {
    for (int i = 0; i < c.count; ++i) grad_q.clear(i);
    bad_queries.forget();
    for (int at = 0; at < c.count; at += BLOCK_KEYS) keys(at, std::min(BLOCK_KEYS, c.count - at));
    for (int i = 0; i < c.count; ++i) {
      store_row(place(b.grad_quad_q, i), grad_q.at(i), pairs.head_dim, pairs.scale);
      store_row(place(b.grad_lin_q, i), grad_lin_q.at(i), p.lin_dim, p.sequences[c.sequence].scale);
      if (p.lost[id] || bad_queries.bad(i)) Base::spoil(b.grad_lin_q, i, p.lin_dim);
    }
  }

  T* place(const Strided& x, int64_t at) const { return const_cast<T*>(row_of<T>(x, c.batch, 0, c.first + at)); }

  void keys(int at, int count) {
    const int padded = vectors(count);
    Base::pack_keys(at, count);
    k_summed.take(k, 0, padded);
    lin_k.forget();
    for (int j = 0; j < count; ++j) {
      if (hidden(p, c, at + j)) {
        lin_k.clear(j);
      } else {
        pack_row<T>(lin_k, j, row_of<T>(p.lin_k, c.batch, 0, c.first + at + j), 1.0f);
      }
    }
    for (int j = count; j < padded; ++j) lin_k.clear(j);
    for (int j = 0; j < padded; ++j) grad_k.clear(j);
    bad_keys.forget();

    const int blocks = int(pairs.chunks);
    int last = -1;
    for (int n = 0; n < blocks; ++n)
      if (Base::find_tiles(n) && Base::find_spans(at, count)) last = n;
    bool first = true;
    for (int n = 0; n <= last; ++n) {
      if (!Base::find_tiles(n) || !Base::find_spans(at, count)) continue;
      queries(at, count, first, n == last);
      first = false;
    }

    transpose(grad_lin_k_t, ld, grad_lin_k.at(0), grad_lin_k.ld, vectors(p.lin_dim), padded);
    const float factor = PAIRS ? logits.factor() : 1.0f;  // fp32 words of queries were packed with it
    for (int j = 0; j < count; ++j) {
      store_row(place(b.grad_quad_k, at + j), grad_k.at(j), pairs.head_dim, factor);
      const bool shown = !hidden(p, c, at + j);
      store_row(place(b.grad_lin_k, at + j), grad_lin_k.at(j), p.lin_dim, shown ? 1.0f : 0.0f);
      if (!shown) continue;
      if (b.grad_lost[id]) Base::spoil(b.grad_lin_k, at + j, p.lin_dim);
      if (b.grad_lost[id] || bad_keys.bad(j)) Base::spoil(b.grad_v, at + j, size);
    }
  }

  // A block of queries with the keys that are packed: the `first` and the `last` that sees any of them.
  void queries(int at, int count, bool first, bool last) {
    const int padded = vectors(count);
    Base::pack_queries();
    q_summed.take(q, 0, rows);
    weigh(at, padded);
    turned_weights.take(weights, ld, rows, 0, padded);
    bad_values.forget();
    bad_upstream.forget();
    for (int panel = 0; panel < panels; ++panel) {
      const int width = width_of(p, panel), words = words_of<PAIRS>(width);
      Base::pack_values(at, count, panel);
      transpose(v.at(0), v.ld, v_t, ld, padded, vectors(words));
      pack_upstream(panel, width, at == 0);
      upstream_summed.take(upstream, 0, rows);
      float* values = grad_v.at(Base::several ? int64_t(panel) * BLOCK_KEYS : 0);
      if (first) through_sum(panel, width, values, padded);
      if (at == 0) {
        float* made = grad_lin_q.at(first_row);
        gemm<PAIRS>({upstream.at(0), upstream.ld, 1, states.at(Base::seen_from, panel, 0), states.ld, made, grad_lin_q.ld,
                     panel ? made : nullptr, grad_lin_q.ld, words},
                    rows, grad_lin_q.padded / W);
      }
      for (size_t n = 0; n < tiles.size(); ++n) grad_of_weights(n, panel, words);
      add_turned(turned_weights, upstream_summed, values, grad_v.ld, padded, vectors(width) / W);
      if (!last) continue;
      for (int j = 0; j < count; ++j) {
        const float* made = values + int64_t(j) * grad_v.ld;
        store_row(place(b.grad_v, at + j) + panel * p.panel, made, width, hidden(p, c, at + j) ? 0.0f : 1.0f);
      }
    }
    through_logits(at, padded);
  }

  // Weights and slopes of a block, zero where a tile meets no key.
  void weigh(int at, int padded) {
    for (size_t n = 0; n < tiles.size(); ++n) {
      const int64_t row = Base::row_in_block(tiles[n]);
      const Span& s = spans[n];
      logits.x = weights + row * ld;
      if (!s.empty()) {
        Base::find_logits(n, at);
        weigh_with_slopes(logits, p.activation, id, 0, tiles[n], at, s, slopes + row * ld);
      }
      clear_around(logits.x, tiles[n].count, s, padded);
      clear_around(grads + row * ld, tiles[n].count, s, padded);
    }
  }

  void clear_around(float* x, int count, const Span& s, int padded) const {
    for (int i = 0; i < count; ++i, x += ld) {
      std::fill(x, x + (s.empty() ? padded : s.from), 0.0f);
      if (!s.empty()) std::fill(x + s.to, x + padded, 0.0f);
    }
  }

  void pack_upstream(int panel, int width, bool with_gate) {
    for (int i = 0; i < rows; ++i) {
      const int64_t t = c.first + first_row + i;
      const T* src = row_of<T>(b.grad_out, c.batch, 0, t) + panel * p.panel;
      const T* gate = p.gate.data ? row_of<T>(p.gate, c.batch, 0, t) + panel * p.panel : nullptr;
      fetch_later(src, b.grad_out, i, rows, width);
      if (gate) fetch_later(gate, p.gate, i, rows, width);
      if (!pack_panel<T>(src, gate, upstream.at(i), width, exact ? rest.at(i) : nullptr)) {
        bad_upstream.mark(i);
        bad_queries.mark(first_row + i);
      }
      if (!with_gate || !b.grad_gate.data) continue;
      const T* sums = row_of<T>(p.sums, c.batch, 0, t) + panel * p.panel;
      T* dst = place(b.grad_gate, first_row + i) + panel * p.panel;
      fetch_later(sums, p.sums, i, rows, width);
      int e = 0;
      for (; e + W <= width; e += W) store(dst + e, load(src + e) * load(sums + e));
      for (; e < width; ++e) from_float(to_float(src[e]) * to_float(sums[e]), dst + e);
    }
  }

  // What keys and values get by way of the sum that they enter.
  void through_sum(int panel, int width, float* values, int padded) {
    grad_states.read(Base::seen_from, panel, grad_state);
    grad_state_summed.take(grad_state, 0, p.lin_dim);
    gemm<PAIRS>({lin_k.at(0), lin_k.ld, 1, grad_state_summed.at(0), grad_state_summed.ld, values, grad_v.ld, nullptr, 0,
                 lin_k.words},
                padded, vectors(width) / W);
    float* made = grad_lin_k_t;
    gemm<PAIRS>({grad_state.at(0), grad_state.ld, 1, v_t, ld, made, ld, panel ? made : nullptr, ld,
                 words_of<PAIRS>(width)},
                p.lin_dim, padded / W);
  }

  void grad_of_weights(size_t n, int panel, int words) {
    const Span& s = spans[n];
    if (s.empty()) return;
    const int64_t row = Base::row_in_block(tiles[n]);
    float* grad = grads + row * ld + s.from;
    const auto add = [&](const Words<PAIRS>& x, bool more) {
      gemm<PAIRS>({x.at(row), x.ld, 1, v_t + s.from, ld, grad, ld, more ? grad : nullptr, ld, words}, tiles[n].count,
                  (s.to - s.from) / W);
    };
    add(upstream, panel > 0);
    if (exact) add(rest, true);
  }

  // to (keys × columns) += xᵀ · rows, of each group of keys from the first query on that sees one of it.
  void add_turned(const TurnedWeights<PAIRS>& x, const Summed<PAIRS>& of_rows, float* to, int to_ld, int padded, int nv) {
    for (int j = 0; j < padded; j += GROUP_KEYS) {
      size_t n = 0;
      while (n < tiles.size() && (spans[n].empty() || spans[n].to <= j)) ++n;
      if (n == tiles.size()) continue;
      const int row = Base::row_in_block(tiles[n]) / 2 * 2, before = PAIRS ? row / 2 : row;
      float* made = to + int64_t(j) * to_ld;
      Gemm g = x.times(of_rows, made, to_ld, made);
      g.a += before * g.col_a + j;
      g.b += before * g.ldb;
      g.K -= before;
      gemm<PAIRS>(g, std::min(GROUP_KEYS, padded - j), nv);
    }
  }

  void through_logits(int at, int padded) {
    if (bad_upstream.any_bad() || bad_values.any_bad() || q.any_bad() || k.any_bad()) find_spoiled(at);
    for (size_t n = 0; n < tiles.size(); ++n) {
      const Span& s = spans[n];
      if (s.empty()) continue;
      float* grad = grads + int64_t(Base::row_in_block(tiles[n])) * ld;
      const float* slope = slopes + int64_t(Base::row_in_block(tiles[n])) * ld;
      for (int i = 0; i < tiles[n].count; ++i)
        for (int j = i * ld + s.from; j < i * ld + s.to; j += W) store(grad + j, load(grad + j) * load(slope + j));
      biases.add(id, 0, tiles[n], at, s, grad, ld);
    }
    add_products(padded);
    if (!PAIRS || pairs.queries > TILE_ROWS) return;
    // again with what rounding left of them: where there are few pairs, one may be most of a gradient
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < padded; j += W) {
        float* x = grads + int64_t(i) * ld + j;
        store(x, rest_of(load(x)));
      }
    add_products(padded);
  }

  void add_products(int padded) {
    turned_grads.take(grads, ld, rows, 0, padded);
    add_turned(turned_grads, q_summed, grad_k.at(0), grad_k.ld, padded, grad_k.padded / W);
    for (size_t n = 0; n < tiles.size(); ++n) {
      const Span& s = spans[n];
      if (s.empty()) continue;
      straight_grads.take(grads + int64_t(Base::row_in_block(tiles[n])) * ld, ld, tiles[n].count, s.from, s.to);
      float* made = grad_q.at(tiles[n].query);
      gemm<PAIRS>(straight_grads.times(k_summed, s.from, s.to, made, grad_q.ld, made), tiles[n].count, grad_q.padded / W);
    }
  }

  // Slopes of pairs in which something is not finite become NaN, and so do the values of their keys.
  void find_spoiled(int at) {
    Buffer again(int64_t(TILE_ROWS) * ld);
    for (size_t n = 0; n < tiles.size(); ++n) {
      if (spans[n].empty()) continue;
      const int row = Base::row_in_block(tiles[n]);
      logits.x = again;
      Base::find_logits(n, at);
      logits.find_spoiled(&bad_upstream, row, bad_values, tiles[n].count, spans[n]);
      for (int64_t pair : logits.spoiled()) {
        slopes[row * ld + pair] = NOT_A_NUMBER;
        bad_keys.mark(pair % ld);
      }
    }
  }

  const BackwardParams& b;
  BiasSums biases;
  const int columns;
  // The product of gate and upstream gradient, which has twice the digits of a bf16, is kept in two parts for gradients
  // that are made of few pairs: those of biases, which are not rounded when they go out either, and of small chunks.
  const bool exact;
  Rows<PAIRS> lin_k;
  Words<PAIRS> upstream, rest, grad_state;  // panels
  Summed<PAIRS> q_summed, k_summed, upstream_summed, grad_state_summed;
  SummedSlots<PAIRS> states;
  Slots<PAIRS> grad_states;
  TurnedWeights<PAIRS> turned_weights, turned_grads;
  Weights<PAIRS> straight_grads;
  Buffer v_t, weights, slopes, grads, grad_lin_k_t;
  Words<> grad_q, grad_lin_q, grad_k, grad_lin_k, grad_v;
  Marks bad_upstream, bad_queries, bad_keys;
};

}  // namespace accel::ACCEL_ISA::flash
