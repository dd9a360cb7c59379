// Linear attention on the CPU, one instruction-set level: see forward.h and backward.h.

#include "backward.h"
#include "forward.h"

namespace accel::ACCEL_ISA::linear {

void linear_attention_states(const Params& p, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  Forward(p).states(from, to);
}

void linear_attention_join(const Params& p, int64_t from, int64_t to) { Forward(p).join(from, to); }

void linear_attention_forward(const Params& p, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  Forward(p).run(from, to);
}

void linear_attention_grad_states(const BackwardParams& b, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  Backward(b).states(from, to);
}

void linear_attention_grad_join(const BackwardParams& b, int64_t from, int64_t to) { Backward(b).join(from, to); }

void linear_attention_backward_q(const BackwardParams& b, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  Backward(b).queries(from, to);
}

void linear_attention_backward_k(const BackwardParams& b, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  Backward(b).keys(from, to);
}

void linear_attention_sum_heads(const BackwardParams& b, int which, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  sum_heads(b, which, from, to);
}

}  // namespace accel::ACCEL_ISA::linear
