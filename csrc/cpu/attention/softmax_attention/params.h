// What the binding hands to a kernel: plain pointers and sizes, no torch type.
#pragma once

#include "cpu/_isa.h"
#include "cpu/_pairs.h"

namespace accel::softmax_attention {

using namespace accel::pairs;

struct Params : PairParams {
  const float* sinks;
  Strided out;
  float* lse;  // (B, Hq, T)
  // (2, B, Hq, T) where something is added to the logits, else null: the log-sum-exp in two parts, the largest logit and
  // the rest, in units of log2(e).
  float* peak;
};

struct BackwardParams : PairSums {
  Params forward;
  Strided grad_out;
  const float* delta;  // (B, Hq, T)
  Strided grad_q, grad_k, grad_v;
};

}  // namespace accel::softmax_attention

ACCEL_DECLARE(softmax_attention, softmax,
  void softmax_attention_forward(const Params& p, int64_t from, int64_t to);
  void softmax_attention_backward(const BackwardParams& p, int64_t from, int64_t to);
  void softmax_attention_sum_queries(const BackwardParams& p, int64_t from, int64_t to);
)
