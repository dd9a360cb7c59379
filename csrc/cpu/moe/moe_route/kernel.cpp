// Routing, a token at a time: scores in vectors, then one walk over the experts that keeps the K best in order.

#include "params.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/_scratch.h"
#include "cpu/_simd.h"

namespace accel::ACCEL_ISA::routing {
namespace {

constexpr float INF = __builtin_huge_valf();

// --- scores ---

vf exp_nonpositive(vf x) { return exp2_nonpositive(x * LOG2_E); }
vf magnitude(vf x) { return max(x, -x); }  // a NaN stays one

vf sigmoid(vf x) {
  const vf e = exp_nonpositive(-magnitude(x)), one = splat(1.0f);
  return (x < 0.0f ? e : one) / (one + e);
}

vf sqrt_softplus(vf x) {
  const vf e = exp_nonpositive(-magnitude(x)), u = 1.0f + e;
  // ln(1 + e) as ln(u) · e / (u − 1): what u lost of e in rounding is in both
  const vf small = u == 1.0f ? e : log2_positive(u) * LN_2 * (e / (u - 1.0f));
  const vf sum = max(x, vf{}) + small;
  vf root;
  for (int i = 0; i < W; ++i) root[i] = std::sqrt(sum[i]);
  return x < -40.0f ? exp_nonpositive(x * 0.5f) : root;
}

// Of a row of logits padded with −∞, e^(l − largest), and what the softmax divides by: with and without what is NaN.
struct Sums {
  float all, numbers;
};

Sums exponentials(const float* logits, float* to, int64_t padded) {
  vf largest = splat(-INF);
  for (int64_t i = 0; i < padded; i += W) largest = max(largest, load(logits + i));  // passes over a NaN
  largest = max_lanes(largest);
  vf all{}, numbers{};
  for (int64_t i = 0; i < padded; i += W) {
    const vf e = exp_nonpositive(load(logits + i) - largest);
    store(to + i, e);
    all += e;
    numbers += e == e ? e : vf{};
  }
  return {sum_lanes(all)[0], sum_lanes(numbers)[0]};
}

void scale_by(float* x, float factor, int64_t padded) {
  for (int64_t i = 0; i < padded; i += W) store(x + i, load(x + i) * factor);
}

// to = the scores of a row. Returns the sum that those of a softmax are still to be divided by, else 1.
Sums scores_of(Score score, const float* logits, float* to, int64_t padded) {
  switch (score) {
    case Score::softmax: return exponentials(logits, to, padded);
    case Score::softmax_topk: std::copy(logits, logits + padded, to); break;
    case Score::sigmoid:
      for (int64_t i = 0; i < padded; i += W) store(to + i, sigmoid(load(logits + i)));
      break;
    case Score::sqrt_softplus:
      for (int64_t i = 0; i < padded; i += W) store(to + i, sqrt_softplus(load(logits + i)));
      break;
  }
  return {1.0f, 1.0f};
}

// --- the choice ---

constexpr int32_t NOTHING = INT32_MIN, NOT_A_NUMBER = INT32_MIN + 1;

// Integers in the order of the floats, the zeros equal, a NaN below all.
int32_t key_of(float x) {
  if (x != x) return NOT_A_NUMBER;
  x += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The best of what was offered, in order; what is offered in ascending order keeps ties at the lower index.
class Best {
 public:
  explicit Best(int64_t count) : keys_(size_t(count), NOTHING), at_(size_t(count)) {}

  void clear() { std::fill(keys_.begin(), keys_.end(), NOTHING); }

  void offer(float x, int64_t index) {
    const int32_t key = key_of(x);
    if (key <= keys_.back()) return;
    size_t i = keys_.size() - 1;
    for (; i > 0 && keys_[i - 1] < key; --i) keys_[i] = keys_[i - 1], at_[i] = at_[i - 1];
    keys_[i] = key, at_[i] = index;
  }

  int64_t operator[](int64_t i) const { return at_[size_t(i)]; }
  std::vector<int64_t>& all() { return at_; }

 private:
  std::vector<int32_t> keys_;
  std::vector<int64_t> at_;
};

// How good a group of experts is.
float value_of(const float* x, int64_t count, Best& two) {
  two.clear();
  for (int64_t i = 0; i < count; ++i) two.offer(x[i], i);
  return two.all().size() < 2 ? x[two[0]] : x[two[0]] + x[two[1]];
}

template <typename T>
void choose_of(const Forward& f, int64_t from, int64_t to) {
  const Params& p = f.p;
  const int64_t X = p.experts, K = p.top_k, padded = round_up(X, W), size = X / f.groups;
  const bool grouped = f.groups > 1;
  Buffer memory(3 * padded);
  float *logits = memory, *scores = logits + padded, *compared = scores + padded;
  Best best(K), groups(f.chosen_groups), two(f.top2_sum ? std::min<int64_t>(2, size) : 1);
  for (int64_t t = from; t < to; ++t) {
    load_row(static_cast<const T*>(p.logits) + t * X, logits, int(X), int(padded));
    std::fill(logits + X, logits + padded, -INF);
    const Sums sums = scores_of(p.score, logits, scores, padded);
    const float* by = logits;
    if (f.bias || grouped) {
      for (int64_t i = 0; i < X; ++i) compared[i] = scores[i] / sums.numbers + (f.bias ? f.bias[i] : 0.0f);
      if (f.bias) by = compared;
    }
    best.clear();
    if (!grouped) {
      for (int64_t i = 0; i < X; ++i) best.offer(by[i], i);
    } else {
      groups.clear();
      for (int64_t g = 0; g < f.groups; ++g) groups.offer(value_of(compared + g * size, size, two), g);
      std::sort(groups.all().begin(), groups.all().end());
      for (const int64_t g : groups.all())
        for (int64_t i = g * size; i < (g + 1) * size; ++i) best.offer(by[i], i);
    }
    float* weights = f.weights + t * K;
    int64_t* indices = f.indices + t * K;
    float sum = 0.0f, factor = p.scale / sums.all;
    for (int64_t k = 0; k < K; ++k) indices[k] = best[k], weights[k] = scores[best[k]];
    if (p.score == Score::softmax_topk) {
      for (int64_t k = 0; k < K; ++k) compared[k] = weights[k];
      for (int64_t k = K; k < round_up(K, W); ++k) compared[k] = -INF;
      factor = p.scale / exponentials(compared, compared, round_up(K, W)).all;
      for (int64_t k = 0; k < K; ++k) weights[k] = compared[k];
    } else if (p.renormalize) {
      for (int64_t k = 0; k < K; ++k) sum += weights[k] / sums.all;
      factor /= sum + p.eps;
    }
    for (int64_t k = 0; k < K; ++k) weights[k] *= factor;
  }
}

// --- gradients ---

template <typename T>
void spread_of(const Backward& b, int64_t from, int64_t to) {
  const Params& p = b.p;
  const int64_t X = p.experts, K = p.top_k, padded = round_up(X, W), width = round_up(K, W);
  Buffer memory(2 * padded + 3 * width);
  float *logits = memory, *row = logits + padded, *chosen = row + padded, *scores = chosen + width, *grads = scores + width;
  for (int64_t t = from; t < to; ++t) {
    load_row(static_cast<const T*>(p.logits) + t * X, logits, int(X), int(padded));
    std::fill(logits + X, logits + padded, -INF);
    const int64_t* indices = b.indices + t * K;
    for (int64_t k = 0; k < width; ++k) chosen[k] = k < K ? logits[indices[k]] : -INF;
    load_row(b.grad_weights + t * K, grads, int(K), int(width));
    scale_by(grads, p.scale, width);
    if (p.score == Score::softmax) {
      scale_by(row, 1.0f / exponentials(logits, row, padded).all, padded);
      for (int64_t k = 0; k < K; ++k) scores[k] = row[indices[k]];
    } else if (p.score == Score::softmax_topk) {
      scale_by(scores, 1.0f / exponentials(chosen, scores, width).all, width);
    } else {
      scores_of(p.score, chosen, scores, width);
    }
    float sum = p.eps, dot = 0.0f;
    for (int64_t k = 0; k < K; ++k) sum += scores[k];
    if (p.renormalize && p.score != Score::softmax_topk) {  // now by the scores
      for (int64_t k = 0; k < K; ++k) dot += grads[k] * (scores[k] / sum);
      for (int64_t k = 0; k < K; ++k) grads[k] = (grads[k] - dot) / sum;
      dot = 0.0f;
    }
    for (int64_t k = 0; k < K; ++k) dot += grads[k] * scores[k];
    if (p.score == Score::softmax) {
      scale_by(row, -dot, padded);
      for (int64_t k = 0; k < K; ++k) row[indices[k]] = scores[k] * (grads[k] - dot);
    } else {
      std::fill(row, row + X, 0.0f);
      if (p.score == Score::softmax_topk) {
        for (int64_t k = 0; k < K; ++k) grads[k] = scores[k] * (grads[k] - dot);
      } else {
        for (int64_t k = 0; k < width; k += W) {
          const vf l = load(chosen + k), s = load(scores + k), up = sigmoid(l);
          const vf slope = p.score == Score::sigmoid ? s * sigmoid(-l) : l < -40.0f ? s * 0.5f : up / (2.0f * s);
          store(grads + k, load(grads + k) * slope);
        }
      }
      for (int64_t k = 0; k < K; ++k) row[indices[k]] = grads[k];
    }
    store_row(static_cast<T*>(b.grad_logits) + t * X, row, int(X), 1.0f);
  }
}

}  // namespace

void choose(const Forward& f, int64_t from, int64_t to) {
  switch (f.p.dtype) {
    case Dtype::f32: return choose_of<float>(f, from, to);
    case Dtype::bf16: return choose_of<bf16>(f, from, to);
    case Dtype::f16: return choose_of<fp16>(f, from, to);
  }
}

void spread(const Backward& b, int64_t from, int64_t to) {
  switch (b.p.dtype) {
    case Dtype::f32: return spread_of<float>(b, from, to);
    case Dtype::bf16: return spread_of<bf16>(b, from, to);
    case Dtype::f16: return spread_of<fp16>(b, from, to);
  }
}

}  // namespace accel::ACCEL_ISA::routing
