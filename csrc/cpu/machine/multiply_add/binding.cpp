// torch op accel_native::multiply_add. benchmarks/_ceilings.py is the only caller: it measures the processor, and computes
// nothing that anybody wants.

#include "params.h"

#include <atomic>

#include "check.h"
#include "cpu/_isa.h"

namespace accel::multiply_add {
namespace {

// `rounds` of the loop for each element of `left`, shared out over the threads; gives the FLOPs of all together.
int64_t run(Tensor left, int64_t rounds, bool halves) {
  const int64_t tasks = left.numel();
  check_f32(left, "left", tasks);
  const auto loop = halves ? ACCEL_LEVEL(multiply_add_bf16) : ACCEL_LEVEL(multiply_add_f32);
  float* out = mutable_floats(left);
  std::atomic<int64_t> flops{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) flops += loop(rounds, out + i);
  });
  return flops;
}

}  // namespace
}  // namespace accel::multiply_add

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def("multiply_add(Tensor(a!) left, int rounds, bool halves) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) { m.impl("multiply_add", TORCH_BOX(&accel::multiply_add::run)); }
