// What the binding hands to a kernel: plain pointers and sizes, no torch type.
#pragma once

#include "cpu/_isa.h"
#include "cpu/_pairs.h"

namespace accel::gau_attention {

using namespace accel::pairs;

enum class Activation : int { relu2, laplace, silu, sigmoid };

struct Params : PairParams {
  Activation activation;
  Strided gate;  // data null if there is none
  Strided out;
  Strided sums;  // the output before the gate; data null if nobody wants it
};

struct BackwardParams : PairSums {
  Params forward;
  Strided grad_out;
  Strided grad_q, grad_k, grad_v;
};

}  // namespace accel::gau_attention

ACCEL_DECLARE(gau_attention, gau,
  void gau_attention_forward(const Params& p, int64_t from, int64_t to);
  void gau_attention_backward(const BackwardParams& p, int64_t from, int64_t to);
  void gau_attention_sum_queries(const BackwardParams& p, int64_t from, int64_t to);
)
