// What the binding of moe_route hands to the kernel: plain pointers and sizes, no torch type.
#pragma once

#include <cstdint>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel::moe_route {

enum class Score : int { softmax, softmax_topk, sigmoid, sqrt_softplus };

struct Params {
  const void* logits;  // (T, X)
  int64_t experts, top_k;
  Dtype dtype;
  Score score;
  bool renormalize;
  float eps, scale;
};

struct Forward {
  Params p;
  const float* bias;  // (X,) or null
  int64_t groups, chosen_groups;
  bool top2_sum;     // of a group; else its best
  float* weights;    // (T, K)
  int64_t* indices;  // (T, K)
};

struct Backward {
  Params p;
  const float* grad_weights;  // (T, K)
  const int64_t* indices;     // (T, K), each from 0 to X − 1
  void* grad_logits;          // (T, X)
};

}  // namespace accel::moe_route

ACCEL_DECLARE(moe_route, routing,
  void choose(const Forward& f, int64_t from, int64_t to);  // tokens
  void spread(const Backward& b, int64_t from, int64_t to);  // tokens
)
