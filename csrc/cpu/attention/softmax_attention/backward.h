// Backward: weights are recomputed from the log-sum-exp, block of keys by block of keys, and every sum has one owner.
//
// With p the weights, dp = dO·Vᵀ and ds = p ∘ (dp − delta): dV = pᵀ·dO, dK = dsᵀ·Q, dQ = ds·K; biases take ds.
#pragma once

#include "cpu/_logits.h"
#include "params.h"

namespace accel::ACCEL_ISA::softmax {

using namespace pairs;

constexpr float FAR = 128.0f;  // a log-sum-exp of that size is still exact to 4e-6

template <typename T>
class Backward {
  static constexpr bool PAIRS = IN_PAIRS<T>;

 public:
  explicit Backward(const BackwardParams& b)
      : b(b),
        p(b.forward),
        group(p.heads / p.kv_heads),
        logits(p),
        biases(p, b, logits),
        q(group * p.queries, p.head_dim),
        grad_o(group * p.queries, p.value_dim),
        k(BLOCK_KEYS, p.head_dim),
        v(BLOCK_KEYS, p.value_dim),
        q_summed(TILE_ROWS, q),
        grad_o_summed(TILE_ROWS, grad_o),
        k_summed(BLOCK_KEYS, k),
        turned(TILE_ROWS, BLOCK_KEYS),
        weights(TILE_ROWS, BLOCK_KEYS),
        tile_ld(spread(BLOCK_KEYS)),
        k_t(int64_t(k.padded) * tile_ld),
        v_t(int64_t(v.padded) * tile_ld),
        grad_s(int64_t(TILE_ROWS) * tile_ld),
        kept(p.dropout ? int64_t(TILE_ROWS) * tile_ld : 0),
        grad_q(group * p.queries, p.head_dim),
        grad_k(BLOCK_KEYS, p.head_dim),
        grad_v(BLOCK_KEYS, p.value_dim),
        top(group * p.queries),
        share(p.peak ? group * p.queries : 0) {}

  void run(int64_t from, int64_t to) {
    const int64_t batches = (p.batch + b.batch_runs - 1) / b.batch_runs;
    const int64_t kv_heads = (p.kv_heads + b.head_runs - 1) / b.head_runs;
    for (int64_t task = from; task < to; ++task) {
      key_run = task % b.key_runs;
      const int64_t kv_run = task / b.key_runs % b.head_runs;
      const int64_t part = task / (b.key_runs * b.head_runs) * b.key_runs + key_run;
      const int64_t first = task / (b.key_runs * b.head_runs) * batches;
      const int64_t kv_first = kv_run * kv_heads, kv_end = std::min(kv_first + kv_heads, p.kv_heads);
      biases.begin(part, kv_first * group, kv_end * group);
      for (int64_t batch = first; batch < std::min(first + batches, p.batch); ++batch)
        for (int64_t kv = kv_first; kv < kv_end; ++kv) head(batch, kv);
    }
  }

 private:
  // The keys of this task of one kv head.
  void head(int64_t batch, int64_t kv) {
    q.forget();
    grad_o.forget();
    for (int64_t g = 0, row = 0; g < group; ++g)
      for (int64_t i = 0; i < p.queries; ++i, ++row) {
        const int64_t h = kv * group + g, at = (batch * p.heads + h) * p.queries + i;
        pack_row<T>(q, row, row_of<T>(p.q, batch, h, i), logits.factor());
        pack_row<T>(grad_o, row, row_of<T>(b.grad_out, batch, h, i), 1.0f);
        grad_q.clear(row);
        const bool nothing = p.lse[at] == NEG_INF;
        top[row] = nothing ? std::numeric_limits<float>::infinity() : p.lse[at] * LOG2_E;
        if (p.peak) {
          const float most = p.peak[at], rest = p.peak[p.batch * p.heads * p.queries + at];
          const bool far = std::abs(most) > FAR && !nothing;
          if (!nothing) top[row] = far ? most : most + rest;
          share[row] = far ? std::exp2(-rest) : 1.0f;
        }
      }
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
    pack_block<T>(k, p.k, batch, kv, first, count);
    pack_block<T>(v, p.v, batch, kv, first, count);
    transpose(k.at(0), k.ld, k_t, tile_ld, vectors(count), k.padded);
    transpose(v.at(0), v.ld, v_t, tile_ld, vectors(count), v.padded);
    k_summed.take(k, 0, vectors(count));
    for (int j = 0; j < vectors(count); ++j) {
      grad_k.clear(j);
      grad_v.clear(j);
    }
    for (int64_t g = 0; g < group; ++g)
      for (int64_t n = 0; n < p.tile_count; ++n) {
        const Tile& tile = p.tiles[batch * p.tiles_batch + n];
        const Span span = meet(tile, first, count);
        if (!span.empty()) step(batch, kv * group + g, g * p.queries + tile.query, tile, first, span);
      }
    // fp32 words of q were packed with scale · log2(e), or with the scale where a softcap keeps natural units
    const float factor = PAIRS ? p.scale : p.softcap > 0.0f ? 1.0f : LN_2;
    for (int j = 0; j < count; ++j) {
      store_row(const_cast<T*>(row_of<T>(b.grad_k, batch, kv, first + j)), grad_k.at(j), p.head_dim, factor);
      store_row(const_cast<T*>(row_of<T>(b.grad_v, batch, kv, first + j)), grad_v.at(j), p.value_dim, 1.0f);
    }
  }

  void step(int64_t batch, int64_t h, int64_t row, const Tile& tile, int64_t first, const Span& s) {
    const int n = tile.count, width = s.to - s.from;
    logits.compute(q, row, k, k_t, tile_ld, batch, h, tile, first, s);
    logits.find_spoiled(&grad_o, row, v, n, s);
    gemm<PAIRS>({grad_o.at(row), grad_o.ld, 1, v_t + s.from, tile_ld, grad_s + s.from, tile_ld, nullptr, 0, v.words}, n,
                width / W);
    const float* delta = b.delta + (batch * p.heads + h) * p.queries + tile.query;
    for (int i = 0; i < n; ++i) {
      float* weight = logits.x + int64_t(i) * logits.ld;
      float* grad = grad_s + int64_t(i) * tile_ld;
      if (p.dropout) {
        drop(batch, h, tile.query + i, first, i, weight, grad, top[row + i], delta[i], s);
      } else {
        through_softmax(weight, grad, top[row + i], delta[i], s);
      }
      if (p.peak && share[row + i] != 1.0f) {
        scale(weight, share[row + i], s);
        scale(grad, share[row + i], s);
      }
    }
    logits.spoil_pairs(logits.x);
    logits.spoil_pairs(grad_s);
    biases.add(batch, h, tile, first, s, grad_s, tile_ld);
    if (p.softcap > 0.0f)
      for (int i = 0; i < n; ++i)
        for (int j = s.from; j < s.to; j += W) {
          float* grad = grad_s + int64_t(i) * tile_ld + j;
          const vf g = load(grad), slope = load(logits.slope() + int64_t(i) * logits.ld + j);
          store(grad, g == 0.0f ? g : g * slope);  // of a pair that is not seen, the slope may be anything
        }
    turned.take(logits.x, logits.ld, n, s.from, s.to);
    grad_o_summed.take(grad_o, row, n);
    gemm<PAIRS>(turned.times(grad_o_summed, grad_v.at(s.from), grad_v.ld, grad_v.at(s.from)), width, grad_v.padded / W);
    turned.take(grad_s, tile_ld, n, s.from, s.to);
    q_summed.take(q, row, n);
    gemm<PAIRS>(turned.times(q_summed, grad_k.at(s.from), grad_k.ld, grad_k.at(s.from)), width, grad_k.padded / W);
    weights.take(grad_s, tile_ld, n, s.from, s.to);
    gemm<PAIRS>(weights.times(k_summed, s.from, s.to, grad_q.at(row), grad_q.ld, grad_q.at(row)), n, grad_q.padded / W);
  }

  // Logits to weights, dp to ds; where the logit is −∞ both are 0, whatever stands in top, dp and delta.
  static void through_softmax(float* weight, float* grad, float top, float delta, const Span& s) {
    const vf zero{}, none = splat(NEG_INF), high = splat(top), less = splat(delta);
    for (int j = s.from; j < s.to; j += W) {
      const vf x = load(weight + j);
      const vf w = exp2_nonpositive(x - high);
      const vf g = w * (load(grad + j) - less);
      store(weight + j, x == none ? zero : w);
      store(grad + j, x == none ? zero : g);
    }
  }

  static void scale(float* x, float factor, const Span& s) {
    for (int j = s.from; j < s.to; j += W) store(x + j, load(x + j) * factor);
  }

  void drop(int64_t batch, int64_t h, int64_t query, int64_t first, int i, float* weight, float* grad, float top,
            float delta, const Span& s) {
    float* keep = kept + int64_t(i) * tile_ld;
    for (int j = s.from; j < s.to; ++j)
      keep[j] = first + j < p.keys ? logits.keep(batch, h, query, first + j) : 0.0f;
    for (int j = s.from; j < s.to; j += W) store(grad + j, load(grad + j) * load(keep + j));
    through_softmax(weight, grad, top, delta, s);
    for (int j = s.from; j < s.to; j += W) store(weight + j, load(weight + j) * load(keep + j));
  }

  const BackwardParams& b;
  const Params& p;
  const int64_t group;
  Logits logits;
  BiasSums biases;
  Rows<PAIRS> q, grad_o, k, v;
  Summed<PAIRS> q_summed, grad_o_summed, k_summed;
  TurnedWeights<PAIRS> turned;
  Weights<PAIRS> weights;
  const int tile_ld;
  Buffer k_t, v_t, grad_s, kept;
  Rows<> grad_q, grad_k, grad_v;
  // What the weights of a row are relative to, in units of log2(e): the log-sum-exp; +∞ for rows that see nothing, whose
  // weights are then 0; and of rows whose largest logit is far from 0 that logit, since the sum of both would lose the
  // other part, which is their share.
  Buffer top, share;
  int64_t key_run = 0;
};

}  // namespace accel::ACCEL_ISA::softmax
