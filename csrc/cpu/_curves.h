// Curves that activations are made of, beside the powers of two of _simd.h.
#pragma once

#include "_scratch.h"
#include "_simd.h"

namespace accel::ACCEL_ISA {

// 2^(x·log2(e)) for x <= 0.
inline vf exp_nonpositive(vf x) { return exp2_nonpositive(x * LOG2_E); }

inline vf absolute(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & 0x7fffffff); }

// ½·erfc(x), relative error below 4e-7 where it is above 1e-10: Numerical Recipes' Chebyshev fit of log(erfc(x)·(1 + x/2)).
inline vf half_erfc(vf x) {
  const vf a = absolute(x), t = 1.0f / (1.0f + 0.5f * a);
  vf p = splat(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const vf y = 0.5f * t * exp_nonpositive(p - a * a);
  return x < 0.0f ? 1.0f - y : y;
}

// 1 / (1 + e^−x), and s·(1 − s) without the difference.
inline vf sigmoid(vf x, vf* falling = nullptr) {
  const vf e = exp_nonpositive(-absolute(x)), inverse = 1.0f / (1.0f + e);
  const vf s = x < 0.0f ? e * inverse : inverse;
  if (falling) *falling = s * (x < 0.0f ? inverse : e * inverse);
  return s;
}

}  // namespace accel::ACCEL_ISA
