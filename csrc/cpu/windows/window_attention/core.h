// The logits and weights of a block of rows of one (window, head).
#pragma once

#include "window.h"

#include <cmath>
#include <limits>

#include "cpu/_pack.h"
#include "cpu/_philox.h"

namespace accel::ACCEL_ISA::window {

constexpr float NORM_EPS = 1e-12f;

// Rows of logits handled together: all of a small window, else as many as keep the block near the first-level cache.
inline int rows_at_once(int64_t tokens, int64_t ld) {
  int64_t rows = std::max<int64_t>(12, 4096 / ld);
  return int(tokens <= 64 ? tokens : std::min(tokens, rows));
}

// Row stride of operands of D numbers: rows of a window are few, and the cache is better filled with nothing else.
template <bool PAIRS>
int dense(int size) {
  return vectors(PAIRS ? (size + 1) / 2 : size);
}

// Everything a worker needs to compute the probabilities of one (window, head). With PAIRS its rows stay what they are
// in memory, bf16, and products are made of pairs of those.
template <typename T, bool PAIRS>
class Core {
 public:
  explicit Core(const Params& p)
      : p(p),
        D(p.head_dim),
        Dp(vectors(p.head_dim)),
        N(p.tokens),
        ld(vectors(p.tokens)),
        body(p.tokens > 1 && p.tokens % W == 1 ? p.tokens - 1 : ld),
        block(rows_at_once(p.tokens, ld)),
        channels(int64_t(p.heads) * p.head_dim),
        window(p),
        q(ld, D, dense<PAIRS>(D)),
        k(ld, D, dense<PAIRS>(D)),
        v(ld, D, dense<PAIRS>(D)),
        v_summed(ld, v),
        k_t(int64_t(k.padded) * ld),
        logits(int64_t(block) * ld),
        q_inverse(ld),
        k_inverse(ld),
        row_max(ld + W),
        row_sum(ld + W),
        ahead_(p),
        mask_(8 * int64_t(ld)),
        last_(padded_to(block, W)) {
    std::fill(last_.data(), last_.end(), -std::numeric_limits<float>::infinity());
    for (Words<PAIRS>* rows : {&q, &k, &v})  // rows from N to ld stay zero for the transpositions
      for (int n = N; n < ld; ++n) rows->clear(n);
    std::fill(logits.data(), logits.end(), 0.0f);  // as do weights behind the last of 49, which may be one of a pair
    std::fill(row_sum.data(), row_sum + ld, 1.0f);
    std::fill(row_max.data(), row_max + ld, 0.0f);
  }

  // Gather q, k, v of the window's head; cosine attention normalises q and k. In fp32 the transposed k, which only
  // makes logits, carries the scale and log2(e).
  void gather(int64_t index, int h) {
    window.move_to(index);
    head = h;
    const float* fill = p.qkv_bias ? p.qkv_bias + int64_t(h) * D : nullptr;
    const T* base = static_cast<const T*>(p.qkv) + int64_t(h) * D;
    scale = p.head_scale ? p.head_scale[h] : p.scale;
    for (int n = 0; n < N; ++n) {
      int64_t row = window.row(n);
      if (row >= 0) {
        const T* token = base + row * 3 * channels;
        q.copy(n, token);
        k.copy(n, token + channels);
        v.copy(n, token + 2 * channels);
      } else {
        fill_row(fill, 0, q, n);
        fill_row(fill, 1, k, n);
        fill_row(fill, 2, v, n);
      }
    }
    if constexpr (PAIRS) {
      transpose(k.at(0), k.ld, k_t, ld, ld, k.padded);
    } else {
      if (p.head_scale)
        for (int n = 0; n < N; ++n) {
          q_inverse[n] = normalize(q.at(n));
          k_inverse[n] = normalize(k.at(n));
        }
      transpose(k.at(0), k.ld, k_t, ld, ld, k.padded, scale * LOG2_E);
    }
    v_summed.take(v, 0, N);
    if (window.masked()) fill_mask();
  }

  // The tokens of the head that is gathered next: `weights` fetches a row of theirs beside each of its own, which comes
  // from far away and would else be waited for.
  void look_ahead(int64_t index, int h) {
    ahead_.move_to(index);
    ahead_head_ = h;
  }

  // logits[0..rows) = 2^(logit − max) for query rows from `first` on; row_max and row_sum are set, nothing is divided.
  void weights(int first, int rows) {
    const float* bias = p.logit_bias + head * p.bias_head_stride + int64_t(first) * ld;
    gemm<PAIRS>({q.at(first), q.ld, 1, k_t, ld, logits, ld, bias, ld, q.words, scale * LOG2_E}, rows, body / W);
    if (body < N) last_logits(first, rows, bias);
    for (int i = 0; i < rows; ++i) {
      if (ahead_.row(first + i) >= 0)
        for (int which = 0; which < 3; ++which)
          fetch(static_cast<const T*>(p.qkv) + (ahead_.row(first + i) * 3 + which) * channels +
                    int64_t(ahead_head_) * D,
                D * sizeof(T));
      float* row = logits + int64_t(i) * ld;
      const float* mask = window.masked() ? mask_ + int64_t(window.label(first + i)) * ld : nullptr;
      if (body == 3 * W) {
        softmax_row<3>(row, mask, first + i, last_[i]);
      } else if (body == 4 * W) {
        softmax_row<4>(row, mask, first + i, last_[i]);
      } else {
        softmax_row<0>(row, mask, first + i, last_[i]);
      }
    }
    if (body < N) last_weights(first, rows);
  }

  // Keep factor (0 or 1/(1−p)) of a weight.
  float keep(int64_t index, int i, int j) const {
    uint64_t position = ((uint64_t(index) * p.heads + head) * N + i) * N + j;
    return philox(p.seed, position) >= p.drop_below ? p.keep_scale : 0.0f;
  }

  const Params& p;
  const int D, Dp, N, ld;
  const int body;  // columns of logits computed as whole vectors: not the last of 49, which would cost a vector a row
  const int block;
  const int64_t channels;
  Window window;
  Words<PAIRS> q, k, v;
  Summed<PAIRS> v_summed;
  Buffer k_t, logits;
  Buffer q_inverse, k_inverse;  // 1 / norm of cosine attention, 0 for a zero vector
  Buffer row_max, row_sum;
  int head = 0;
  float scale = 1.0f;

 private:
  void fill_row(const float* fill, int which, Words<PAIRS>& rows, int n) const {
    using Element = std::conditional_t<PAIRS, bf16, float>;
    rows.clear(n);
    Element* dst = reinterpret_cast<Element*>(rows.at(n));
    for (int d = 0; fill && d < D; ++d) from_float(fill[which * channels + d], dst + d);
  }

  // Divide a row by its norm and return 1 / norm.
  float normalize(float* row) const {
    vf squares{};
    for (int d = 0; d < Dp; d += W) squares += load(row + d) * load(row + d);
    float norm = std::sqrt(sum_lanes(squares)[0]);
    float inverse = norm == 0.0f ? 0.0f : 1.0f / std::max(norm, NORM_EPS);
    for (int d = 0; d < Dp; d += W) store(row + d, load(row + d) * inverse);
    return inverse;
  }

  // Row `label` of the mask: what a query of that region adds to each key.
  void fill_mask() {
    for (int label = 0; label < 8; ++label)
      for (int n = 0; n < N; ++n)
        mask_[int64_t(label) * ld + n] = window.label(n) == label ? 0.0f : p.mask_value * LOG2_E;
    for (int label = 0; label < 8; ++label)
      std::fill(mask_ + int64_t(label) * ld + N, mask_ + int64_t(label + 1) * ld, 0.0f);
  }

  // last_[i] = logit of row i and the last key.
  void last_logits(int first, int rows, const float* bias) {
    const float* key = k.at(N - 1);
    for (int i = 0; i < rows; ++i) {
      const float* query = q.at(first + i);
      vf dot{};
      for (int d = 0; d < k.padded; d += W) dot = multiply_add<PAIRS>(dot, load(query + d), load(key + d));
      float logit = sum_lanes(dot)[0] * (scale * LOG2_E) + bias[int64_t(i) * ld + N - 1];
      if (window.masked()) logit += mask_[int64_t(window.label(first + i)) * ld + N - 1];
      last_[i] = logit;
    }
  }

  // The last key's weights, a vector of rows at a time, once the rows' maxima are known.
  void last_weights(int first, int rows) {
    for (int i = 0; i < rows; i += W) {
      vf weight = exp2_nonpositive(load(last_ + i) - load(row_max + first + i));
      store(last_ + i, weight);
      store(row_sum + first + i, load(row_sum + first + i) + weight);
    }
    for (int i = 0; i < rows; ++i) logits[int64_t(i) * ld + N - 1] = last_[i];
  }

  // The first `body` columns of a row; `at_least` is a logit the maximum must cover. NV > 0: they are that many
  // vectors, and stay in registers.
  template <int NV>
  void softmax_row(float* row, const float* mask, int n, float at_least) {
    if constexpr (NV > 0) {
      vf x[NV];
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) x[i] = load(row + i * W);
      if (mask) {
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) x[i] += load(mask + i * W);
      }
      vf top = splat(at_least);
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) top = max(x[i], top);
      top = max_lanes(top);
      vf sum{};
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        x[i] = exp2_nonpositive(x[i] - top);
        sum += x[i];
        store(row + i * W, x[i]);
      }
      row_max[n] = top[0];
      row_sum[n] = sum_lanes(sum)[0];
    } else {
      vf top = splat(at_least);
      for (int j = 0; j < body; j += W) {
        vf x = load(row + j);
        if (mask) {
          x += load(mask + j);
          store(row + j, x);
        }
        top = max(x, top);
      }
      top = max_lanes(top);
      vf sum{};
      for (int j = 0; j < body; j += W) {
        vf x = exp2_nonpositive(load(row + j) - top);
        store(row + j, x);
        sum += x;
      }
      row_max[n] = top[0];
      row_sum[n] = sum_lanes(sum)[0];
    }
  }

  Window ahead_;
  int ahead_head_ = 0;
  Buffer mask_;
  Buffer last_;  // logits, then weights, of the last key where it is not in the body; −∞ otherwise
};

}  // namespace accel::ACCEL_ISA::window
