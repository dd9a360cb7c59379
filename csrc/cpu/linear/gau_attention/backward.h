// Backward: weights are made again, block of keys by block of keys, and every sum has one owner.
//
// With w the weights, s their slopes and g = dO ∘ gate: dV = wᵀ·g, dx = s ∘ (g·Vᵀ), dK = dxᵀ·Q, dQ = dx·K; biases take dx.
#pragma once

#include "weights.h"

namespace accel::ACCEL_ISA::gau {

// Queries handled together: each panel of values and of their gradients is then read once for all of them.
constexpr int STEP_TILES = 2;

template <typename T>
class Backward {
  static constexpr bool PAIRS = IN_PAIRS<T>;

 public:
  explicit Backward(const BackwardParams& b)
      : b(b),
        p(b.forward),
        group(p.heads / p.kv_heads),
        panels(panels_of(p.value_dim)),
        logits(p),
        biases(p, b, logits),
        q(STEP_TILES * TILE_ROWS, p.head_dim),
        k(BLOCK_KEYS, p.head_dim),
        v(BLOCK_KEYS, PANEL),
        upstream(int64_t(panels) * STEP_TILES * TILE_ROWS, PANEL),
        exact(PAIRS && p.gate.data && (b.grad_bias || b.part_line || b.part_table || p.queries <= TILE_ROWS)),
        rest(exact ? int64_t(panels) * STEP_TILES * TILE_ROWS : 0, PANEL),
        q_summed(TILE_ROWS, q),
        k_summed(BLOCK_KEYS, k),
        upstream_summed(STEP_TILES * TILE_ROWS, upstream),
        turned_weights{{STEP_TILES * TILE_ROWS, BLOCK_KEYS}, {TILE_ROWS, BLOCK_KEYS}},
        turned_grads(TILE_ROWS, BLOCK_KEYS),
        grads_of_keys(TILE_ROWS, BLOCK_KEYS),
        ld(logits.ld),
        k_t(int64_t(k.padded) * ld),
        v_t(int64_t(panels) * v.padded * ld),
        weights(int64_t(STEP_TILES) * TILE_ROWS * ld),
        slopes(int64_t(STEP_TILES) * TILE_ROWS * ld),
        grads(int64_t(STEP_TILES) * TILE_ROWS * ld),
        grad_q(group * p.queries, p.head_dim),
        grad_k(BLOCK_KEYS, p.head_dim),
        grad_v(int64_t(panels) * BLOCK_KEYS, PANEL),
        bad_values(BLOCK_KEYS),
        bad_upstream(STEP_TILES * TILE_ROWS) {}

  void run(int64_t from, int64_t to) {
    const int64_t batches = (p.batch + b.batch_runs - 1) / b.batch_runs;
    const int64_t kv_heads = (p.kv_heads + b.head_runs - 1) / b.head_runs;
    for (int64_t task = from; task < to; ++task) {
      const int64_t turn = task % b.key_runs;  // early and late keys take turns, as they differ in work
      key_run = turn % 2 ? b.key_runs - 1 - turn / 2 : turn / 2;
      const int64_t kv_run = task / b.key_runs % b.head_runs, batch_run = task / (b.key_runs * b.head_runs);
      const int64_t kv_first = kv_run * kv_heads, kv_end = std::min(kv_first + kv_heads, p.kv_heads);
      biases.begin(batch_run * b.key_runs + key_run, kv_first * group, kv_end * group);
      for (int64_t batch = batch_run * batches; batch < std::min((batch_run + 1) * batches, p.batch); ++batch)
        for (int64_t kv = kv_first; kv < kv_end; ++kv) head(batch, kv);
    }
  }

 private:
  // The keys of this task of one kv head.
  void head(int64_t batch, int64_t kv) {
    for (int64_t row = 0; row < group * p.queries; ++row) grad_q.clear(row);
    const int64_t end = std::min(p.keys, (key_run + 1) * b.keys_per_run);
    for (int64_t first = key_run * b.keys_per_run; first < end; first += BLOCK_KEYS)
      block(batch, kv, first, int(std::min<int64_t>(BLOCK_KEYS, end - first)));
    for (int64_t g = 0, row = 0; g < group; ++g)
      for (int64_t i = 0; i < p.queries; ++i, ++row) {
        const int64_t h = kv * group + g;
        if (b.part_q) {
          float* dst = b.part_q + (((key_run * p.batch + batch) * p.heads + h) * p.queries + i) * p.head_dim;
          store_row(dst, grad_q.at(row), p.head_dim, p.scale);
        } else {
          store_row(const_cast<T*>(row_of<T>(b.grad_q, batch, h, i)), grad_q.at(row), p.head_dim, p.scale);
        }
      }
  }

  void block(int64_t batch, int64_t kv, int64_t first, int count) {
    const int padded = vectors(count);
    pack_block<T>(k, p.k, batch, kv, first, count);
    transpose(k.at(0), k.ld, k_t, ld, padded, k.padded);
    bad_values.forget();
    for (int panel = 0; panel < panels; ++panel) {
      const int width = panel_width(p.value_dim, panel);
      for (int j = 0; j < count; ++j) {
        const T* src = row_of<T>(p.v, batch, kv, first + j) + panel * PANEL;
        if (!pack_panel<T>(src, nullptr, v.at(j), width)) bad_values.mark(j);
      }
      for (int j = count; j < padded; ++j) v.clear(j);
      transpose(v.at(0), v.ld, v_t_at(panel), ld, padded, vectors(words_of<PAIRS>(width)));
      for (int j = 0; j < padded; ++j) std::fill_n(grad_v_at(panel, j), vectors(width), 0.0f);
    }
    k_summed.take(k, 0, padded);
    for (int j = 0; j < padded; ++j) grad_k.clear(j);

    for (int64_t g = 0; g < group; ++g)
      for (int64_t n = 0; n < p.tile_count; n += STEP_TILES)
        step(batch, kv * group + g, g * p.queries, n, std::min<int64_t>(n + STEP_TILES, p.tile_count), first, count);

    const float factor = PAIRS ? logits.factor() : 1.0f;  // fp32 words of queries were packed with it
    for (int j = 0; j < count; ++j) {
      store_row(const_cast<T*>(row_of<T>(b.grad_k, batch, kv, first + j)), grad_k.at(j), p.head_dim, factor);
      T* dst = const_cast<T*>(row_of<T>(b.grad_v, batch, kv, first + j));
      for (int panel = 0; panel < panels; ++panel)
        store_row(dst + panel * PANEL, grad_v_at(panel, j), panel_width(p.value_dim, panel), 1.0f);
    }
  }

  // Tiles [from, to) of one query head, whose rows of grad_q begin at `row`.
  void step(int64_t batch, int64_t h, int64_t row, int64_t from, int64_t to, int64_t first, int count) {
    Span spans[STEP_TILES];
    bool some = false;
    const Tile* tiles = p.tiles + batch * p.tiles_batch + from;
    const int many = int(to - from);
    for (int n = 0; n < many; ++n) {
      spans[n] = meet(tiles[n], first, count);
      some |= !spans[n].empty();
    }
    if (!some) return;
    q.forget();
    bad_upstream.forget();
    for (int n = 0; n < many; ++n)
      if (!spans[n].empty()) pack_rows(batch, h, tiles[n], n * TILE_ROWS);
    for (int n = 0; n < many; ++n)
      if (!spans[n].empty()) weigh_tile(batch, h, tiles[n], n * TILE_ROWS, first, spans[n]);

    // two whole tiles that meet the same keys are one of twice as many rows: sums over them are longer
    const bool joined = many == 2 && tiles[0].count == TILE_ROWS && spans[0].from == spans[1].from &&
                        spans[0].to == spans[1].to && !spans[1].empty();
    const int runs = joined ? 1 : many;
    const auto rows_of_run = [&](int n) { return joined ? TILE_ROWS + tiles[1].count : tiles[n].count; };
    for (int n = 0; n < runs; ++n)
      if (!spans[n].empty())
        turned_weights[n].take(weights + int64_t(n) * TILE_ROWS * ld, ld, rows_of_run(n), spans[n].from, spans[n].to);
    for (int panel = 0; panel < panels; ++panel) {
      const int width = panel_width(p.value_dim, panel);
      for (int n = 0; n < runs; ++n) {
        const Span& s = spans[n];
        if (s.empty()) continue;
        const int rows = rows_of_run(n);
        const int64_t row = upstream_row(panel, n * TILE_ROWS);
        float* grad = grads + int64_t(n) * TILE_ROWS * ld + s.from;
        gemm<PAIRS>({upstream.at(row), upstream.ld, 1, v_t_at(panel) + s.from, ld, grad, ld, panel ? grad : nullptr, ld,
                     words_of<PAIRS>(width)},
                    rows, (s.to - s.from) / W);
        if (exact)
          gemm<PAIRS>({rest.at(row), rest.ld, 1, v_t_at(panel) + s.from, ld, grad, ld, grad, ld,
                       words_of<PAIRS>(width)},
                      rows, (s.to - s.from) / W);
        float* values = grad_v_at(panel, s.from);
        upstream_summed.take(upstream, row, rows);
        gemm<PAIRS>(turned_weights[n].times(upstream_summed, values, grad_v.ld, values), s.to - s.from,
                    vectors(width) / W);
      }
    }
    for (int n = 0; n < many; ++n)
      if (!spans[n].empty()) through_logits(batch, h, row + tiles[n].query, tiles[n], n, first, spans[n]);
  }

  void pack_rows(int64_t batch, int64_t h, const Tile& tile, int at) {
    for (int i = 0; i < tile.count; ++i) {
      pack_row<T>(q, at + i, row_of<T>(p.q, batch, h, tile.query + i), logits.factor());
      const T* src = row_of<T>(b.grad_out, batch, h, tile.query + i);
      const T* gate = p.gate.data ? row_of<T>(p.gate, batch, h, tile.query + i) : nullptr;
      for (int panel = 0; panel < panels; ++panel) {
        const int column = panel * PANEL;
        const int64_t row = upstream_row(panel, at + i);
        if (!pack_panel<T>(src + column, gate ? gate + column : nullptr, upstream.at(row),
                           panel_width(p.value_dim, panel), exact ? rest.at(row) : nullptr))
          bad_upstream.mark(at + i);
      }
    }
  }

  void weigh_tile(int64_t batch, int64_t h, const Tile& tile, int at, int64_t first, const Span& s) {
    logits.x = weights + int64_t(at) * ld;
    logits.compute(q, at, k, k_t, ld, batch, h, tile, first, s);
    spoiled[at / TILE_ROWS].clear();
    logits.find_spoiled(&bad_upstream, at, bad_values, tile.count, s);
    if (logits.any_spoiled()) spoiled[at / TILE_ROWS] = logits.spoiled();
    weigh_with_slopes(logits, p.activation, batch, h, tile, first, s, slopes + int64_t(at) * ld);
    for (int64_t pair : spoiled[at / TILE_ROWS]) logits.x[pair] = NOT_A_NUMBER;
  }

  void through_logits(int64_t batch, int64_t h, int64_t row, const Tile& tile, int n, int64_t first, const Span& s) {
    float* grad = grads + int64_t(n) * TILE_ROWS * ld;
    const float* slope = slopes + int64_t(n) * TILE_ROWS * ld;
    for (int i = 0; i < tile.count; ++i)
      for (int j = s.from; j < s.to; j += W) {
        float* x = grad + int64_t(i) * ld + j;
        store(x, load(x) * load(slope + int64_t(i) * ld + j));
      }
    for (int64_t pair : spoiled[n]) grad[pair] = NOT_A_NUMBER;
    biases.add(batch, h, tile, first, s, grad, ld);
    q_summed.take(q, n * TILE_ROWS, tile.count);
    add_products(grad, row, tile.count, s);
    if constexpr (!PAIRS) return;
    // again with what rounding left of them: of few pairs, as a window has them, one may be most of a gradient
    for (int i = 0; i < tile.count; ++i)
      for (int j = s.from; j < s.to; j += W) {
        float* x = grad + int64_t(i) * ld + j;
        store(x, rest_of(load(x)));
      }
    add_products(grad, row, tile.count, s);
  }

  void add_products(const float* grad, int64_t row, int count, const Span& s) {
    turned_grads.take(grad, ld, count, s.from, s.to);
    gemm<PAIRS>(turned_grads.times(q_summed, grad_k.at(s.from), grad_k.ld, grad_k.at(s.from)), s.to - s.from,
                grad_k.padded / W);
    grads_of_keys.take(grad, ld, count, s.from, s.to);
    gemm<PAIRS>(grads_of_keys.times(k_summed, s.from, s.to, grad_q.at(row), grad_q.ld, grad_q.at(row)), count,
                grad_q.padded / W);
  }

  static int64_t upstream_row(int panel, int row) { return int64_t(panel) * STEP_TILES * TILE_ROWS + row; }
  float* v_t_at(int panel) const { return v_t + int64_t(panel) * v.padded * ld; }
  float* grad_v_at(int panel, int key) const { return grad_v.at(int64_t(panel) * BLOCK_KEYS + key); }

  const BackwardParams& b;
  const Params& p;
  const int64_t group;
  const int panels;
  Logits logits;
  BiasSums biases;
  Rows<PAIRS> q, k;
  Words<PAIRS> v, upstream;  // a panel, and all panels one after the other
  // The product of gate and upstream gradient, which has twice the digits of a bf16, is kept in two parts for gradients
  // that are made of few pairs: those of biases, which are not rounded when they go out either, and of few queries.
  const bool exact;
  Words<PAIRS> rest;
  Summed<PAIRS> q_summed, k_summed, upstream_summed;
  TurnedWeights<PAIRS> turned_weights[STEP_TILES], turned_grads;
  Weights<PAIRS> grads_of_keys;
  const int ld;
  Buffer k_t, v_t;
  Buffer weights, slopes, grads;
  Rows<> grad_q, grad_k;
  Words<> grad_v;
  Marks bad_values, bad_upstream;
  std::vector<int64_t> spoiled[STEP_TILES];
  int64_t key_run = 0;
};

}  // namespace accel::ACCEL_ISA::gau
