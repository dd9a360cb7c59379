// What the binding hands to a kernel: plain pointers and sizes, no torch type. Rows are choices sorted by expert.
#pragma once

#include "cpu/moe/grouped_linear/params.h"

namespace accel::moe_experts {

using namespace accel::grouped_linear;

enum class Function : int { silu, gelu, gelu_tanh, relu, relu2 };

// a = f(min(g, limit)) · (clamp(u, −limit, limit) + shift), or f(h) without a gate.
struct Gate {
  Function function;
  float alpha, limit, shift;  // limit is infinite where there is none
  bool gated, interleaved;
  int64_t inner;  // I, the numbers that are left

  int64_t outputs() const { return gated ? 2 * inner : inner; }
};

// The first product, of which the epilogue makes activations. A task's columns count activations, or outputs where gate
// and up take turns.
struct First {
  Product product;
  Gate gate;
  const float* bias;  // (X, J) or null
  void* hidden;       // (N, J) or null: the product, for a backward
  void* active;       // (N, I)
};

// The gradient behind the activation, d = gradient · Wᵀ of the second layer, meets the activation made again.
struct Behind {
  Product product;  // of rows without the weight of their choice; with no weights in it there is no such product
  Gate gate;
  const void* hidden;    // (N, J)
  const float* weights;  // (N,)
  void* grad_hidden;     // (N, J) or null
  void* weighed;         // (N, I) or null: weight · activation
  float* dots;           // (blocks of I, N) or null: d · activation, zero to begin with
  int64_t rows;          // N
};

// out (T, columns) = the sum over k of weights (T, K) · rows at place (T, K), in the order of k.
struct Combine {
  const float* rows;     // (N, columns)
  const float* weights;  // null: all are 1
  const int64_t* place;
  int64_t choices, columns;
  void* out;
  Dtype dtype;
  Tasks tasks;
};

// grad (T, K) of weights = the sum of the dots at its place + gradient · bias of its expert.
struct Router {
  const float* dots;
  int64_t blocks, rows;  // of dots
  const void* grad_out;  // (T, columns)
  const float* bias;     // (X, columns) or null
  const int64_t *indices, *place;
  int64_t choices, columns;
  float* out;
  Dtype dtype;
  Tasks tasks;
};

}  // namespace accel::moe_experts

ACCEL_DECLARE(moe_experts, moe,
  void moe_experts_first(const First& p);
  void moe_experts_behind(const Behind& p);
  void moe_experts_combine(const Combine& p);
  void moe_experts_router(const Router& p);
)
