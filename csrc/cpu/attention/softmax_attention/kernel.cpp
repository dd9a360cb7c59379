// Softmax attention on the CPU, one instruction-set level: see forward.h and backward.h.

#include "backward.h"
#include "forward.h"

namespace accel::ACCEL_ISA::softmax {

void softmax_attention_forward(const Params& p, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  if (p.dtype == Dtype::f32) Forward<float>(p).run(from, to);
  if (p.dtype == Dtype::bf16) Forward<bf16>(p).run(from, to);
  if (p.dtype == Dtype::f16) Forward<fp16>(p).run(from, to);
}

void softmax_attention_backward(const BackwardParams& p, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  if (p.forward.dtype == Dtype::f32) Backward<float>(p).run(from, to);
  if (p.forward.dtype == Dtype::bf16) Backward<bf16>(p).run(from, to);
  if (p.forward.dtype == Dtype::f16) Backward<fp16>(p).run(from, to);
}

void softmax_attention_sum_queries(const BackwardParams& p, int64_t from, int64_t to) {
  if (p.forward.dtype == Dtype::f32) sum_queries<float>(p.forward, p, p.grad_q, from, to);
  if (p.forward.dtype == Dtype::bf16) sum_queries<bf16>(p.forward, p, p.grad_q, from, to);
  if (p.forward.dtype == Dtype::f16) sum_queries<fp16>(p.forward, p, p.grad_q, from, to);
}

}  // namespace accel::ACCEL_ISA::softmax
