// Feature maps and their derivatives, element by element.
#pragma once

#include "params.h"

#include "cpu/_scratch.h"
#include "cpu/_simd.h"

namespace accel::ACCEL_ISA::linear {

// 2^n · e^r of x = n · ln 2 + r, for −87 ≤ x ≤ 88.73; relative error below 3e-7.
[[gnu::always_inline]] inline vf exp_within(vf x) {
  const vf shifted = x * LOG2_E + 12582912.0f;  // 1.5 · 2^23: the integer part lands in the low bits
  const vf n = shifted - 12582912.0f;
  const vf f = ((x - n * 0.693359375f) + n * 2.12194440e-4f) * LOG2_E;  // ln 2 in two parts, the first of few digits
  vf p = splat(1.326472707e-3f);  // as in exp2_nonpositive
  p = p * f + 9.671512649e-3f;
  p = p * f + 5.550733744e-2f;
  p = p * f + 2.402224209e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(shifted) << 23));
}

// e^min(x, 0); 0 below −87, 1 for a NaN.
[[gnu::always_inline]] inline vf exp_of_negative(vf x) {
  const vf below = min(x, vf{});
  const vf y = exp_within(max(below, splat(-87.0f)));
  return below < -87.0f ? vf{} : y;
}

// e^x; 0 below −87, infinite above 88.72, a NaN stays one.
inline vf exp(vf x) {
  vf y = exp_within(min(max(x, splat(-87.0f)), splat(88.72283f)));
  y = x < -87.0f ? vf{} : y;
  y = x > 88.72283f ? splat(__builtin_huge_valf()) : y;
  return x == x ? y : x;
}

struct Identity {
  static vf value(vf x) { return x; }
  static vf slope(vf) { return splat(1.0f); }
};
struct Elu1 {
  static vf value(vf x) { return max(x, vf{}) + exp_of_negative(x); }  // of which one part is 0 or 1
  static vf slope(vf x) { return exp_of_negative(x); }
};
struct Relu {
  static vf value(vf x) { return max(x, vf{}); }
  static vf slope(vf x) { return x > 0.0f ? splat(1.0f) : vf{}; }
};
struct SquaredRelu {
  static vf value(vf x) { return max(x, vf{}) * max(x, vf{}); }
  static vf slope(vf x) { return 2.0f * max(x, vf{}); }
};
struct Exp {
  static vf value(vf x) { return exp(x); }
  static vf slope(vf x) { return exp(x); }
};

using accel::linear_attention::Map;

template <typename F>
inline void with_map(Map map, F f) {
  if (map == Map::identity) f(Identity{});
  if (map == Map::elu1) f(Elu1{});
  if (map == Map::relu) f(Relu{});
  if (map == Map::squared_relu) f(SquaredRelu{});
  if (map == Map::exp) f(Exp{});
}

}  // namespace accel::ACCEL_ISA::linear
