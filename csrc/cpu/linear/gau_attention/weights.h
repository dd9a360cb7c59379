// The activations: logits to weights, and their derivatives. A logit of −∞ is a pair that weighs nothing.
#pragma once

#include "cpu/_curves.h"
#include "cpu/_logits.h"
#include "params.h"

namespace accel::ACCEL_ISA::gau {

using namespace pairs;

// A weight and its derivative by the logit.
struct Weight {
  vf value, slope;
};

template <Activation A>
inline Weight weigh(vf x) {
  const vf zero{};
  if constexpr (A == Activation::relu2) {
    const vf r = max(x, zero);
    return {r * r, 2.0f * r};
  } else if constexpr (A == Activation::laplace) {
    const vf z = (x - 0.70710678f) * 2.50662827f;  // (x − √½)·√(2π)
    return {half_erfc(-z), 1.41421356f * exp_nonpositive(-z * z)};
  } else {
    vf falling;
    const vf s = sigmoid(x, &falling);
    if constexpr (A == Activation::sigmoid) return {s, falling};
    const vf none = splat(NEG_INF);
    return {x == none ? zero : x * s, x == none ? zero : s + x * falling};
  }
}

// f(std::integral_constant) of the activation, so that a loop over a tile is made for each.
template <typename F>
void with_activation(Activation a, F f) {
  using enum Activation;
  if (a == relu2) f(std::integral_constant<Activation, relu2>{});
  if (a == laplace) f(std::integral_constant<Activation, laplace>{});
  if (a == silu) f(std::integral_constant<Activation, silu>{});
  if (a == sigmoid) f(std::integral_constant<Activation, sigmoid>{});
}

// The tile's logits become weights where they lie, or what dropout leaves of them.
inline void weigh_tile(const Logits& logits, Activation a, int64_t b, int64_t h, const Tile& tile, int64_t keys,
                       const Span& s) {
  with_activation(a, [&](auto activation) {
    for (int i = 0; i < tile.count; ++i) {
      float* x = logits.x + int64_t(i) * logits.ld;
      for (int j = s.from; j < s.to; j += W) store(x + j, weigh<activation>(load(x + j)).value);
      if (!logits.p.dropout) continue;
      for (int j = s.live_from; j < s.live_to; ++j) x[j] *= logits.keep(b, h, tile.query + i, keys + j);
    }
  });
}

// The same as the first operand of a product.
template <bool PAIRS>
void take_weights(const Logits& logits, Activation a, int64_t b, int64_t h, const Tile& tile, Weights<PAIRS>& of,
                  int64_t keys, const Span& s) {
  if (!PAIRS || logits.p.dropout) {
    weigh_tile(logits, a, b, h, tile, keys, s);
    of.take(logits.x, logits.ld, tile.count, s.from, s.to);
    return;
  }
  of.begin(s.from);
  with_activation(a, [&](auto activation) {
    for (int i = 0; i < tile.count; ++i) {
      const float* x = logits.x + int64_t(i) * logits.ld;
      of.fill_row(i, s.from, s.to, [&](int j) { return weigh<activation>(load(x + j)).value; });
    }
  });
}

// The tile's logits become weights, beside their slopes, both as dropout leaves them.
inline void weigh_with_slopes(const Logits& logits, Activation a, int64_t b, int64_t h, const Tile& tile, int64_t keys,
                              const Span& s, float* slopes) {
  with_activation(a, [&](auto activation) {
    for (int i = 0; i < tile.count; ++i) {
      float* x = logits.x + int64_t(i) * logits.ld;
      float* slope = slopes + int64_t(i) * logits.ld;
      for (int j = s.from; j < s.to; j += W) {
        const Weight w = weigh<activation>(load(x + j));
        store(x + j, w.value);
        store(slope + j, w.slope);
      }
      if (!logits.p.dropout) continue;
      for (int j = s.live_from; j < s.live_to; ++j) {
        const float keep = logits.keep(b, h, tile.query + i, keys + j);
        x[j] *= keep;
        slope[j] *= keep;
      }
    }
  });
}

// Columns of values that are multiplied at a time: a block of keys of them stays in the second-level cache.
constexpr int PANEL = 128;

inline int panels_of(int size) { return (size + PANEL - 1) / PANEL; }
inline int panel_width(int size, int panel) { return std::min(PANEL, size - panel * PANEL); }

template <bool PAIRS>
int words_of(int size) {
  return PAIRS ? (size + 1) / 2 : size;
}

// What is left of x when it was rounded to bf16.
inline vf rest_of(vf x) { return x - reinterpret_cast<vf>(round_to_bf16(x) & 0xffff0000u); }

// The same as pack_panel in pairs, which a product with `mul` is rounded to; what is left of it goes to `rest`, unless
// that is null.
template <typename T>
bool pack_panel_pairs(const T* src, const T* mul, float* dst, float* rest, int n) {
  T *to = reinterpret_cast<T*>(dst), *small = reinterpret_cast<T*>(rest);
  bool finite = true;
  int d = 0;
  for (; d + 2 * W <= n; d += 2 * W) {
    vh2 x = *reinterpret_cast<const vh2_unaligned*>(src + d);
    if (mul) {
      vf even, odd, mul_even, mul_odd;
      load_two(src + d, even, odd);
      load_two(mul + d, mul_even, mul_odd);
      even *= mul_even, odd *= mul_odd;
      x = mated(even, odd);
      if (small) *reinterpret_cast<vh2_unaligned*>(small + d) = mated(rest_of(even), rest_of(odd));
    }
    finite &= all_finite(x);
    *reinterpret_cast<vh2_unaligned*>(to + d) = x;
  }
  if (d < n) {
    for (; d < n; ++d) {
      to[d] = src[d];
      if (mul) {
        const float x = to_float(src[d]) * to_float(mul[d]);
        from_float(x, to + d);
        if (small) from_float(x - to_float(to[d]), small + d);
      }
      finite &= bool(std::isfinite(to_float(to[d])));
    }
    const size_t behind = size_t(2 * vectors((n + 1) / 2) - n) * sizeof(T);
    std::memset(to + n, 0, behind);
    if (small) std::memset(small + n, 0, behind);
  }
  if (finite) return true;
  for (int c = 0; c < n; ++c)
    if (!std::isfinite(to_float(to[c]))) {
      to[c] = T{0};
      if (small) small[c] = T{0};
    }
  return false;
}

// n numbers of a row as words, times those of `mul` if there are any; zeros behind them up to whole vectors. False if
// one was not finite, which is then 0.
template <typename T>
bool pack_panel(const T* src, const T* mul, float* dst, int n, [[maybe_unused]] float* rest = nullptr) {
  if constexpr (IN_PAIRS<T>) return pack_panel_pairs(src, mul, dst, rest, n);
  vf check{};  // 0 · x is NaN for what is not finite
  int d = 0;
  for (; d + W <= n; d += W) {
    vf x = load(src + d);
    if (mul) x *= load(mul + d);
    check += x * 0.0f;
    store(dst + d, x);
  }
  if (d < n) {
    for (int c = d; c < n; ++c) dst[c] = to_float(src[c]) * (mul ? to_float(mul[c]) : 1.0f);
    for (int c = n; c < vectors(n); ++c) dst[c] = 0.0f;
    check += load(dst + d) * 0.0f;
  }
  if (sum_lanes(check)[0] == 0.0f) return true;
  for (int c = 0; c < n; ++c)
    if (!std::isfinite(dst[c])) dst[c] = 0.0f;
  return false;
}

// Rows that held something not finite, as Rows remembers them.
class Marks {
 public:
  explicit Marks(int64_t rows) : bad_(size_t(rows)) {}
  void mark(int64_t row) { bad_[size_t(row)] = any_ = true; }
  void forget() {
    if (any_) std::fill(bad_.begin(), bad_.end(), 0);
    any_ = false;
  }
  bool bad(int64_t row) const { return bad_[size_t(row)]; }
  bool any_bad() const { return any_; }

 private:
  std::vector<char> bad_;
  bool any_ = false;
};

}  // namespace accel::ACCEL_ISA::gau
