// Linear attention on the CPU, one instruction-set level: see forward.h and backward.h.

#include "backward.h"
#include "forward.h"

namespace accel::ACCEL_ISA::linear {
namespace {

template <typename F>
void with_type(Dtype dtype, F f) {
  [[maybe_unused]] FlushSubnormals flush;
  if (dtype == Dtype::f32) f(float{});
  if (dtype == Dtype::bf16) f(bf16{});
  if (dtype == Dtype::f16) f(fp16{});
}

}  // namespace

void linear_attention_states(const Params& p, int64_t from, int64_t to) {
  with_type(p.dtype, [&](auto x) { Forward<decltype(x)>(p).states(from, to); });
}

void linear_attention_join(const Params& p, int64_t from, int64_t to) { Forward<float>(p).join(from, to); }

void linear_attention_forward(const Params& p, int64_t from, int64_t to) {
  with_type(p.dtype, [&](auto x) { Forward<decltype(x)>(p).run(from, to); });
}

void linear_attention_grad_states(const BackwardParams& b, int64_t from, int64_t to) {
  with_type(b.forward.dtype, [&](auto x) { Backward<decltype(x)>(b).states(from, to); });
}

void linear_attention_grad_join(const BackwardParams& b, int64_t from, int64_t to) {
  Backward<float>(b).join(from, to);
}

void linear_attention_backward_q(const BackwardParams& b, int64_t from, int64_t to) {
  with_type(b.forward.dtype, [&](auto x) { Backward<decltype(x)>(b).queries(from, to); });
}

void linear_attention_backward_k(const BackwardParams& b, int64_t from, int64_t to) {
  with_type(b.forward.dtype, [&](auto x) { Backward<decltype(x)>(b).keys(from, to); });
}

void linear_attention_sum_heads(const BackwardParams& b, int which, int64_t from, int64_t to) {
  with_type(b.forward.dtype, [&](auto x) { sum_heads<decltype(x)>(b, which, from, to); });
}

}  // namespace accel::ACCEL_ISA::linear
