// Backward: weights are recomputed from the log-sum-exp, block of keys by block of keys, and every sum has one owner.
//
// With p the weights, dp = dO·Vᵀ and ds = p ∘ (dp − delta): dV = pᵀ·dO, dK = dsᵀ·Q, dQ = ds·K; biases take ds.
#pragma once

#include "tile.h"

namespace accel::ACCEL_ISA::softmax {

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
      part = task / (b.key_runs * b.head_runs) * b.key_runs + key_run;
      const int64_t first = task / (b.key_runs * b.head_runs) * batches;
      const int64_t kv_first = kv_run * kv_heads, kv_end = std::min(kv_first + kv_heads, p.kv_heads);
      for (int64_t h = kv_first * group; h < kv_end * group; ++h) {
        if (b.part_line) std::fill_n(line_part(h), p.line_length, 0.0f);
        if (b.part_table) std::fill_n(table_part(h), p.table_rows, 0.0f);
      }
      for (int64_t batch = first; batch < std::min(first + batches, p.batch); ++batch)
        for (int64_t kv = kv_first; kv < kv_end; ++kv) head(batch, kv);
    }
  }

 private:
  float* line_part(int64_t h) const { return b.part_line + (part * p.heads + h) * p.line_length; }
  float* table_part(int64_t h) const { return b.part_table + (part * p.heads + h) * p.table_rows; }

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
    if (b.part_line) add_line(batch, h, tile, first, s);
    if (b.part_table) add_table(h, tile, first, s);
    if (b.grad_bias) add_bias(batch, h, tile, first, s);
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

  // Columns that are keys: what lies behind them in the last vector is no pair.
  int real(int64_t first, const Span& s) const { return int(std::min<int64_t>(s.to, p.keys - first)); }

  void add_line(int64_t batch, int64_t h, const Tile& tile, int64_t first, const Span& s) {
    // Only between the first and the last key that some row sees is every pair's place within the line.
    const int64_t offset = logits.line_offset(batch, tile) + first;
    for (int i = 0; i < tile.count; ++i) {
      float* dst = line_part(h) + offset - i;
      const float* src = grad_s + int64_t(i) * tile_ld;
      int j = std::max<int64_t>(s.live_from, i - offset);
      const int end = int(std::min<int64_t>(s.live_to, p.line_length - offset + i));
      for (; j + W <= end; j += W) store(dst + j, load(dst + j) + load(src + j));
      for (; j < end; ++j) dst[j] += src[j];
    }
  }

  void add_table(int64_t h, const Tile& tile, int64_t first, const Span& s) {
    float* dst = table_part(h);
    const int end = real(first, s);
    for (int i = 0; i < tile.count; ++i) {
      const float* src = grad_s + int64_t(i) * tile_ld;
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

  void add_bias(int64_t batch, int64_t h, const Tile& tile, int64_t first, const Span& s) {
    const int end = real(first, s);
    for (int i = 0; i < tile.count; ++i) {
      const int64_t at = batch * b.grad_bias_stride[0] + h * b.grad_bias_stride[1] +
                         (tile.query + i) * b.grad_bias_stride[2] + first * b.grad_bias_stride[3];
      float* dst = b.grad_bias + at;
      const float* src = grad_s + int64_t(i) * tile_ld;
      const int64_t step = b.grad_bias_stride[3];
      for (int j = s.from; j < end; ++j) dst[j * step] += src[j];
    }
  }

  const BackwardParams& b;
  const Params& p;
  const int64_t group;
  Logits logits;
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
  int64_t key_run = 0, part = 0;
};

// grad_q of heads [from, to) of the batch = Σ over runs of keys, in their order.
template <typename T>
void sum_queries(const BackwardParams& b, int64_t from, int64_t to) {
  const Params& p = b.forward;
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
      store_row(const_cast<T*>(row_of<T>(b.grad_q, head / p.heads, head % p.heads, i)), row.data(), p.head_dim, 1.0f);
    }
}

}  // namespace accel::ACCEL_ISA::softmax
