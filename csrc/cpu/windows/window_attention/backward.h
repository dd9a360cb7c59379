// Backward: the weights are computed again, block of rows by block of rows. A task owns some heads of a run of windows.
#pragma once

#include "core.h"

#include <vector>

#include "cpu/_table.h"

namespace accel::ACCEL_ISA::window {

// Gradient through x / max(|x|, eps), given the normalised row and 1 / max(|x|, eps); padded is a multiple of W.
inline void through_norm(float* grad, const float* unit, float inverse, int padded) {
  vf dot{};
  for (int d = 0; d < padded; d += W) dot += load(grad + d) * load(unit + d);
  float along = inverse < 1.0f / NORM_EPS ? sum_lanes(dot)[0] : 0.0f;
  for (int d = 0; d < padded; d += W) store(grad + d, (load(grad + d) - load(unit + d) * along) * inverse);
}

template <typename T, bool PAIRS>
class Backward {
 public:
  explicit Backward(const BackwardParams& b)
      : b(b),
        p(b.forward),
        core(p),
        N(core.N),
        D(core.D),
        Dp(core.Dp),
        ld(core.ld),
        block(core.block),
        v_t(int64_t(core.v.padded) * ld),
        grad_o(block, D, dense<PAIRS>(D)),
        q_summed(block, core.q),
        k_summed(ld, core.k),
        grad_o_summed(block, grad_o),
        weights(block, ld),
        turned_weights(block, ld),
        turned_grads(block, ld),
        grad_logits(int64_t(block) * ld),
        grad_q(int64_t(block) * Dp),
        grad_k(int64_t(ld) * Dp),
        grad_v(int64_t(ld) * Dp),
        grad_bias(b.want_table || b.want_dense ? b.group_heads * N * ld : 0),
        keep(p.dropout ? int64_t(block) * ld : 0) {}

  void run(int64_t task) {
    const int64_t group = task / b.chunks, chunk = task % b.chunks, total = p.batch * p.windows;
    const int64_t begin = total * chunk / b.chunks, end = total * (chunk + 1) / b.chunks;
    const int from = int(group * b.group_heads), to = std::min(p.heads, int(from + b.group_heads));
    std::fill(grad_bias.data(), grad_bias.end(), 0.0f);
    grad_scale.assign(size_t(to - from), 0.0);
    if (b.part_qkv_bias)
      for (int h = from; h < to; ++h) std::fill_n(b.part_qkv_bias + (h * b.chunks + chunk) * 3 * D, 3 * D, 0.0f);
    for (int64_t index = begin; index < end; ++index)
      for (int h = from; h < to; ++h) {
        core.gather(index, h);
        core.look_ahead(h + 1 < to ? index : std::min(index + 1, end - 1), h + 1 < to ? h + 1 : from);
        part_fill = b.part_qkv_bias ? b.part_qkv_bias + (h * b.chunks + chunk) * 3 * D : nullptr;
        window(index, h, h - from);
      }
    for (int h = from; h < to; ++h) {
      const int64_t part = h * b.chunks + chunk;
      if (b.part_head_scale) b.part_head_scale[part] = float(grad_scale[size_t(h - from)]);
      finish_bias(grad_bias + int64_t(h - from) * N * ld, part);
    }
  }

 private:
  // One (window, head) that has been gathered; `slot` is the head's place in the task.
  void window(int64_t index, int h, int slot) {
    transpose(core.v.at(0), core.v.ld, v_t, ld, ld, core.v.padded);
    k_summed.take(core.k, 0, N);
    for (int first = 0; first < N; first += block) {
      const int rows = std::min(block, N - first);
      const float* init_k = first ? grad_k.data() : nullptr;
      const float* init_v = first ? grad_v.data() : nullptr;
      for (int i = 0; i < rows; ++i) fetch_row(h, first + i);
      core.weights(first, rows);
      load_grad_out(h, first, rows);
      gemm<PAIRS>({grad_o.at(0), grad_o.ld, 1, v_t, ld, grad_logits, ld, nullptr, 0, grad_o.words}, rows, ld / W);
      float* sum = b.want_table || b.want_dense ? grad_bias + (int64_t(slot) * N + first) * ld : nullptr;
      if (PAIRS && !p.dropout) {
        turned_weights.begin(rows, 0);
        turned_grads.begin(rows, 0);
        for (int i = 0; i < rows; i += 2) two_through_softmax(first + i, i, i + 1 < rows, sum);
      } else {
        for (int i = 0; i < rows; ++i) through_softmax(index, first + i, i);
        for (int64_t e = 0; sum && e < int64_t(rows) * ld; e += W)
          store(sum + e, load(sum + e) + load(grad_logits + e));
        turned_weights.take(core.logits, ld, rows, 0, N);
        turned_grads.take(grad_logits, ld, rows, 0, N);
      }
      grad_o_summed.take(grad_o, 0, rows);
      gemm<PAIRS>(turned_weights.times(grad_o_summed, grad_v, Dp, init_v), N, Dp / W);
      q_summed.take(core.q, first, rows);
      gemm<PAIRS>(turned_grads.times(q_summed, grad_k, Dp, init_k), N, Dp / W);
      weights.take(grad_logits, ld, rows, 0, N);
      gemm<PAIRS>(weights.times(k_summed, 0, N, grad_q, Dp, nullptr), rows, Dp / W);
      for (int i = 0; i < rows; ++i) {
        float* row = grad_q + int64_t(i) * Dp;
        if (!PAIRS && p.head_scale) through_scale(row, first + i, slot);
        emit(h, first + i, 0, row, core.scale);
      }
    }
    for (int n = 0; n < N; ++n) {
      float* row = grad_k + int64_t(n) * Dp;
      if (!PAIRS && p.head_scale) through_norm(row, core.k.at(n), core.k_inverse[n], Dp);
      emit(h, n, 1, row, core.scale);
      emit(h, n, 2, grad_v + int64_t(n) * Dp, 1.0f);
    }
  }

  // A row of Σ_j dlogit · k̂_j to the gradient of q; its product with q̂ is the gradient of the scale.
  void through_scale(float* row, int n, int slot) {
    const float* unit = core.q.at(n);
    vf dot{};
    for (int d = 0; d < Dp; d += W) dot += load(row + d) * load(unit + d);
    grad_scale[size_t(slot)] += double(sum_lanes(dot)[0]);
    through_norm(row, unit, core.q_inverse[n], Dp);
  }

  void load_grad_out(int h, int first, int rows) {
    const T* base = static_cast<const T*>(b.grad_out) + int64_t(h) * D;
    for (int i = 0; i < rows; ++i) {
      const int64_t token = core.window.row(first + i);
      if (token >= 0) {
        grad_o.copy(i, base + token * core.channels);
      } else {
        grad_o.clear(i);  // the output of a padded token is thrown away
      }
    }
  }

  // Row i of the block: weights become probabilities (after dropout), their gradients those of the logits.
  void through_softmax(int64_t index, int n, int i) {
    float* weight = core.logits + int64_t(i) * ld;
    float* grad = grad_logits + int64_t(i) * ld;
    float* kept = keep + int64_t(p.dropout ? i : 0) * ld;
    const float inverse = 1.0f / core.row_sum[n];
    for (int j = N; j < ld; ++j) weight[j] = 0.0f;  // no key there
    if (p.dropout) {
      for (int j = 0; j < N; ++j) kept[j] = core.keep(index, n, j);
      for (int j = N; j < ld; ++j) kept[j] = 0.0f;
      for (int j = 0; j < ld; j += W) store(grad + j, load(grad + j) * load(kept + j));
    }
    vf dot{};
    for (int j = 0; j < ld; j += W) {
      vf w = load(weight + j) * inverse;
      store(weight + j, w);
      dot += w * load(grad + j);
    }
    dot = sum_lanes(dot);
    for (int j = 0; j < ld; j += W) store(grad + j, load(weight + j) * (load(grad + j) - dot));
    if (p.dropout)
      for (int j = 0; j < ld; j += W) store(weight + j, load(weight + j) * load(kept + j));
  }

  // The same of row i and the next, for products in pairs: probabilities are rounded without being stored before, and
  // `sum`, if not null, takes the gradients of the logits.
  void two_through_softmax(int n, int i, bool two, float* sum) {
    const int64_t next = two ? ld : 0;  // of an odd last row, which is its own mate with weights of zero
    const float* weight = core.logits + int64_t(i) * ld;
    float* grad = grad_logits + int64_t(i) * ld;
    const vf inverse[2] = {splat(1.0f / core.row_sum[n]), two ? splat(1.0f / core.row_sum[n + 1]) : vf{}};
    vf dot[2] = {};
    for (int j = 0; j < ld; j += W) {
      dot[0] += load(weight + j) * inverse[0] * load(grad + j);
      dot[1] += load(weight + next + j) * inverse[1] * load(grad + next + j);
    }
    for (vf& x : dot) x = sum_lanes(x);
    for (int j = 0; j < ld; j += W) {
      const vf w[2] = {load(weight + j) * inverse[0], load(weight + next + j) * inverse[1]};
      const vf g[2] = {w[0] * (load(grad + j) - dot[0]), w[1] * (load(grad + next + j) - dot[1])};
      turned_weights.put(i, j, w[0], w[1]);
      turned_grads.put(i, j, g[0], g[1]);
      store(grad + next + j, g[1]);
      store(grad + j, g[0]);
      if (!sum) continue;
      float* to = sum + int64_t(i) * ld + j;
      store(to, load(to) + g[0]);
      if (two) store(to + ld, load(to + ld) + g[1]);
    }
  }

  // Starts to bring a token's upstream gradient, which is read next, and the places its gradients go to.
  void fetch_row(int h, int n) const {
    const int64_t token = core.window.row(n), C = core.channels;
    if (token < 0) return;
    fetch(static_cast<const T*>(b.grad_out) + token * C + int64_t(h) * D, D * sizeof(T));
    for (int which = 0; which < 3; ++which)
      fetch<true>(static_cast<const T*>(b.grad_qkv) + (token * 3 + which) * C + int64_t(h) * D, D * sizeof(T));
  }

  // Write a finished gradient row to its token, or add it to what padded tokens hold.
  void emit(int h, int n, int which, const float* row, float mul) {
    const int64_t token = core.window.row(n), C = core.channels;
    if (token >= 0) {
      store_row(static_cast<T*>(b.grad_qkv) + (token * 3 + which) * C + int64_t(h) * D, row, D, mul);
    } else if (part_fill) {
      for (int d = 0; d < D; ++d) part_fill[which * D + d] += row[d] * mul;
    }
  }

  void finish_bias(const float* sum, int64_t part) {
    if (b.want_table) {
      float* out = b.part_bias + part * b.table_rows;
      std::fill(out, out + b.table_rows, 0.0f);
      TableIndex table(p.window);
      for (int i = 0; i < N; ++i)
        table.for_each_line(i, 0, N, [&](int64_t j, int64_t r, int64_t count) {
          for (int64_t x = 0; x < count; ++x) out[r - x] += sum[int64_t(i) * ld + j + x];
        });
    } else if (b.want_dense) {
      for (int i = 0; i < N; ++i)
        std::memcpy(b.part_bias + (part * N + i) * N, sum + int64_t(i) * ld, size_t(N) * sizeof(float));
    }
  }

  const BackwardParams& b;
  const Params& p;
  Core<T, PAIRS> core;
  const int N, D, Dp, ld, block;
  Buffer v_t;
  Words<PAIRS> grad_o;
  Summed<PAIRS> q_summed, k_summed, grad_o_summed;
  Weights<PAIRS> weights;
  TurnedWeights<PAIRS> turned_weights, turned_grads;
  Buffer grad_logits, grad_q, grad_k, grad_v;
  Buffer grad_bias;  // (heads of the task, N, ld)
  Buffer keep;
  std::vector<double> grad_scale;
  float* part_fill = nullptr;
};

}  // namespace accel::ACCEL_ISA::window
