// Mixed chunk attention on the CPU, one instruction-set level: see states.h, forward.h and backward.h.

#include "backward.h"
#include "forward.h"

namespace accel::ACCEL_ISA::flash {

// f of a number of the call's dtype.
template <typename F>
inline void with_dtype(const Params& p, F f) {
  [[maybe_unused]] FlushSubnormals flush;
  if (p.pairs.dtype == Dtype::f32) f(float{});
  if (p.pairs.dtype == Dtype::bf16) f(bf16{});
  if (p.pairs.dtype == Dtype::f16) f(fp16{});
}

void flash_mix_states(const Params& p, int64_t from, int64_t to) {
  with_dtype(p, [&](auto of) { States<decltype(of)>(p, false).run(from, to); });
}

void flash_mix_forward(const Params& p, int64_t from, int64_t to) {
  with_dtype(p, [&](auto of) { Forward<decltype(of)>(p).run(from, to); });
}

// Tasks in turn: what the chunks' queries see, turned round, and what their keys enter.
void flash_mix_grad_states(const BackwardParams& b, int64_t from, int64_t to) {
  with_dtype(b.forward, [&](auto of) {
    States<decltype(of)> states(b.forward, true);
    GradStates<decltype(of)> grads(b);
    for (int64_t task = from; task < to; ++task) {
      if (task % 2) {
        grads.run(task / 2, task / 2 + 1);
      } else {
        states.run(task / 2, task / 2 + 1);
      }
    }
  });
}

void flash_mix_backward(const BackwardParams& b, int64_t from, int64_t to) {
  with_dtype(b.forward, [&](auto of) { Backward<decltype(of)>(b).run(from, to); });
}

}  // namespace accel::ACCEL_ISA::flash
