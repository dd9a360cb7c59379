// torch ops accel_native::moe_permute_{forward,backward}. accel/ops/moe/moe_permute.py is the only caller and the place
// where the op is defined. Rows are written and summed by the kernel of moe_unpermute, without weights.

#include <tuple>

#include "cpu/moe/moe_unpermute/run.h"
#include "cpu/moe/plan.h"

namespace accel::moe_permute {
namespace {

using namespace accel::moe_unpermute;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor indices, OptionalTensor weights,
                                                           int64_t num_experts, int64_t capacity, int64_t align,
                                                           int64_t rows) {
  moe::Plan plan = moe::make_plan(indices, weights, num_experts, capacity, align, rows);
  const Params p = describe(x, plan.source, plan.destination);
  Tensor out = run_spread(p, x, {}, {}, nullptr);
  return {out, plan.source, plan.destination, plan.counts, plan.offsets};
}

Tensor backward(Tensor grad_rows, Tensor destination, Tensor, OptionalTensor, Ints x, int64_t, int64_t, int64_t,
                int64_t rows) {
  STD_TORCH_CHECK(x.size() == 2 && grad_rows.dim() == 2 && grad_rows.size(0) == rows && grad_rows.size(1) == x[1],
                  "the gradient must have the shape of the rows");
  Params p = describe(grad_rows, torch::stable::new_empty(destination, {0}), destination);
  p.source = nullptr, p.rows = rows;  // sums are over the choices of a token, and read it not
  STD_TORCH_CHECK(p.tokens == x[0], "destination must have the tokens of x");
  return run_combine(p, grad_rows, {});
}

}  // namespace
}  // namespace accel::moe_permute

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def(
      "moe_permute_forward(Tensor x, Tensor indices, Tensor? weights, int num_experts, int capacity, int align, int rows) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_permute_backward(Tensor grad_rows, Tensor destination, Tensor indices, Tensor? weights, int[] x_size, int "
      "num_experts, int capacity, int align, int rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("moe_permute_forward", TORCH_BOX(&accel::moe_permute::forward));
  m.impl("moe_permute_backward", TORCH_BOX(&accel::moe_permute::backward));
}
