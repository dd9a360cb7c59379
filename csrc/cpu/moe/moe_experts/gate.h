// The activation between an expert's two products, and its gradients, a row at a time.
#pragma once

#include "cpu/_curves.h"
#include "cpu/_pack.h"
#include "params.h"

namespace accel::ACCEL_ISA::moe {

using namespace accel::moe_experts;

struct Curve {
  vf value, slope;
};

template <Function F>
inline Curve curve(vf x, float alpha) {
  const vf zero{};
  if constexpr (F == Function::silu) {
    vf falling;
    const vf s = sigmoid(alpha * x, &falling);
    return {x * s, s + alpha * x * falling};
  } else if constexpr (F == Function::gelu) {
    const vf below = half_erfc(x * -0.70710678f);
    return {x * below, below + x * 0.39894228f * exp_nonpositive(x * x * -0.5f)};
  } else if constexpr (F == Function::gelu_tanh) {  // ½·(1 + tanh(y)) is the sigmoid of 2·y
    vf falling;
    const vf s = sigmoid(1.59576912f * (x + 0.044715f * x * x * x), &falling);
    return {x * s, s + x * falling * 1.59576912f * (1.0f + 0.134145f * x * x)};
  } else if constexpr (F == Function::relu) {
    return {max(x, zero), x > 0.0f ? splat(1.0f) : zero};
  } else {
    const vf r = max(x, zero);
    return {r * r, 2.0f * r};
  }
}

// f(std::integral_constant) of the function, so that a loop is made for each.
template <typename F>
void with_function(Function function, F f) {
  if (function == Function::silu) f(std::integral_constant<Function, Function::silu>{});
  if (function == Function::gelu) f(std::integral_constant<Function, Function::gelu>{});
  if (function == Function::gelu_tanh) f(std::integral_constant<Function, Function::gelu_tanh>{});
  if (function == Function::relu) f(std::integral_constant<Function, Function::relu>{});
  if (function == Function::relu2) f(std::integral_constant<Function, Function::relu2>{});
}

inline vf at_most(vf x, float limit) { return x > limit ? splat(limit) : x; }
inline vf within(vf x, float limit) { return x < -limit ? splat(-limit) : at_most(x, limit); }

// active[j] = the activation, for whole vectors of `count` numbers; `up` is not read without a gate.
template <Function F>
inline void activate(const Gate& p, const float* gate, const float* up, float* active, int count) {
  for (int j = 0; j < count; j += W) {
    const vf value = curve<F>(at_most(load(gate + j), p.limit), p.alpha).value;
    store(active + j, p.gated ? value * (within(load(up + j), p.limit) + p.shift) : value);
  }
}

// With d the gradient of what is weighed: gate and up become their gradients, weighed = weight · activation; returns
// d · activation. `count` whole vectors; d is 0 behind what is real, and null where no gradient is wanted.
template <Function F>
inline float activate_backward(const Gate& p, const float* d, float weight, float* gate, float* up, float* weighed,
                               int count) {
  vf dot{};
  for (int j = 0; j < count; j += W) {
    const vf g = load(gate + j), u = p.gated ? load(up + j) : vf{};
    const Curve made = curve<F>(at_most(g, p.limit), p.alpha);
    const vf factor = p.gated ? within(u, p.limit) + p.shift : splat(1.0f), a = made.value * factor;
    store(weighed + j, a * weight);
    if (!d) continue;
    const vf grad = load(d + j) * weight, zero{};
    dot += load(d + j) * a;
    store(gate + j, g > p.limit ? zero : grad * factor * made.slope);
    if (p.gated) store(up + j, absolute(u) > p.limit ? zero : grad * made.value);
  }
  return sum_lanes(dot)[0];
}

// --- gate and up in turn ---

inline void part(const float* turns, float* gate, float* up, int count) {
  for (int j = 0; j < count; ++j) gate[j] = turns[2 * j], up[j] = turns[2 * j + 1];
}

inline void join(const float* gate, const float* up, float* turns, int count) {
  for (int j = 0; j < count; ++j) turns[2 * j] = gate[j], turns[2 * j + 1] = up[j];
}

}  // namespace accel::ACCEL_ISA::moe
