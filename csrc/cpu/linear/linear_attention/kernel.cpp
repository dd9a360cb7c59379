// Linear attention on the CPU, one instruction-set level: see forward.h and backward.h.

#include "backward.h"
#include "forward.h"

namespace accel::ACCEL_ISA::linear {

// f(whether products are made of pairs of bf16), which only one level has. A state that goes out is fp32, made of
// features that are not rounded. So is that of all keys at once and what comes of it in a backward, since there a rounded
// feature alone moves rows by more than they may be off: pairs make the `output` of it, and nothing else.
template <typename F>
inline void with_pairs(const Params& p, bool output, F f) {
  if constexpr (IN_PAIRS<bf16>)
    if (p.dtype == Dtype::bf16 && !p.keep_state && (p.causal || output)) return f(std::true_type{});
  f(std::false_type{});
}

void linear_attention_states(const Params& p, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  with_pairs(p, false, [&](auto pairs) { Forward<pairs>(p).states(from, to); });
}

void linear_attention_join(const Params& p, int64_t from, int64_t to) { Forward<false>(p).join(from, to); }

void linear_attention_forward(const Params& p, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  with_pairs(p, true, [&](auto pairs) { Forward<pairs>(p).run(from, to); });
}

void linear_attention_grad_states(const BackwardParams& b, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  with_pairs(b.forward, false, [&](auto pairs) { Backward<pairs>(b).states(from, to); });
}

void linear_attention_grad_join(const BackwardParams& b, int64_t from, int64_t to) {
  Backward<false>(b).join(from, to);
}

void linear_attention_backward_q(const BackwardParams& b, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  with_pairs(b.forward, false, [&](auto pairs) { Backward<pairs>(b).queries(from, to); });
}

void linear_attention_backward_k(const BackwardParams& b, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  with_pairs(b.forward, false, [&](auto pairs) { Backward<pairs>(b).keys(from, to); });
}

void linear_attention_sum_heads(const BackwardParams& b, int which, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  sum_heads(b, which, from, to);
}

}  // namespace accel::ACCEL_ISA::linear
