// torch ops accel_native::moe_unpermute_{forward,backward}. accel/ops/moe/moe_unpermute.py is the only caller and the place
// where the op is defined.

#include <tuple>

#include "run.h"

namespace accel::moe_unpermute {
namespace {

Tensor forward(Tensor y, OptionalTensor weights, Tensor source, Tensor destination) {
  return run_combine(describe(y, source, destination), y, weights);
}

std::tuple<Tensor, Tensor> backward(Tensor grad_out, Tensor y, OptionalTensor weights, Tensor source,
                                    Tensor destination, Bools needs) {
  STD_TORCH_CHECK(needs.size() == 1, "needs: of weights");
  const Params p = describe(y, source, destination);
  const bool wanted = weights && needs[0];
  Ints shape{0};
  if (wanted) shape = {p.tokens, p.choices};
  Tensor grad_weights = torch::stable::new_empty(y, shape, ScalarType::Float);
  Tensor grad_y = run_spread(p, grad_out, weights, wanted ? OptionalTensor(y) : OptionalTensor(),
                             wanted ? mutable_floats(grad_weights) : nullptr);
  return {grad_y, grad_weights};
}

}  // namespace
}  // namespace accel::moe_unpermute

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def("moe_unpermute_forward(Tensor y, Tensor? weights, Tensor source, Tensor destination) -> Tensor");
  m.def(
      "moe_unpermute_backward(Tensor grad_out, Tensor y, Tensor? weights, Tensor source, Tensor destination, bool[] "
      "needs) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("moe_unpermute_forward", TORCH_BOX(&accel::moe_unpermute::forward));
  m.impl("moe_unpermute_backward", TORCH_BOX(&accel::moe_unpermute::backward));
}
