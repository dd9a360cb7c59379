// torch ops accel_native::grouped_linear_{forward,backward}: checks, allocation, threads. Every argument has the form that
// accel/ops/moe/grouped_linear.py gives it, which is the only caller and the place where the op is defined.

#include <cstring>
#include <tuple>

#include "run.h"

namespace accel::grouped_linear {
namespace {

const int64_t* check_offsets(const Tensor& offsets, int64_t experts, int64_t rows) {
  const int64_t* at = indices_of(offsets, "offsets");
  STD_TORCH_CHECK(offsets.numel() == experts + 1, "offsets must have ", experts + 1, " elements, has ", offsets.numel());
  STD_TORCH_CHECK(at[0] == 0, "offsets must begin with 0, got ", at[0]);
  for (int64_t e = 0; e < experts; ++e)
    STD_TORCH_CHECK(at[e] <= at[e + 1], "offsets must not fall, got ", at[e], " and ", at[e + 1], " at ", e);
  STD_TORCH_CHECK(at[experts] <= rows, "offsets must end within ", rows, " rows, got ", at[experts]);
  return at;
}

// out (N, outputs) = x · W, + bias.
void multiply(const Tensor& x, const Tensor& weight, const int64_t* offsets, bool transposed, const float* bias,
              Tensor& out) {
  const int64_t end = offsets[weight.size(0)];
  const Rows rows{x.const_data_ptr(), x.size(1), nullptr};
  grouped_products(rows, weight, offsets, transposed, bias, out, false, dtype_of(x, "grouped_linear takes"));
  const size_t row = size_t(out.size(1)) * out.element_size();
  std::memset(static_cast<char*>(out.mutable_data_ptr()) + size_t(end) * row, 0, size_t(out.size(0) - end) * row);
}

void check(const Tensor& x, const Tensor& weight, int64_t outputs, bool transposed) {
  check_cpu(x, "x");
  STD_TORCH_CHECK(x.dim() == 2, "x must be (N, C)");
  const int64_t c = x.size(1);
  check_matrices(weight, x, transposed ? c : outputs, transposed ? outputs : c, "weight");
}

Tensor forward(Tensor x, Tensor weight, OptionalTensor bias, Tensor offsets, bool transposed) {
  STD_TORCH_CHECK(weight.dim() == 3, "weight must have three axes");
  const int64_t outputs = weight.size(transposed ? 2 : 1);
  check(x, weight, outputs, transposed);
  check_f32(bias, "bias", weight.size(0) * outputs);
  const int64_t* at = check_offsets(offsets, weight.size(0), x.size(0));
  Tensor out = torch::stable::new_empty(x, {x.size(0), outputs});
  multiply(x, weight, at, transposed, data_or_null(bias), out);
  return out;
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}, ScalarType::Float); }

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor x, Tensor weight, OptionalTensor bias,
                                            Tensor offsets, bool transposed, Bools needs) {
  STD_TORCH_CHECK(grad_out.dim() == 2 && grad_out.size(0) == x.size(0), "grad_out must have the rows of x");
  const int64_t outputs = grad_out.size(1), experts = weight.size(0);
  check(x, weight, outputs, transposed);
  check_cpu(grad_out, "grad_out");
  STD_TORCH_CHECK(grad_out.scalar_type() == x.scalar_type(), "grad_out must have the dtype of x");
  const int64_t* at = check_offsets(offsets, experts, x.size(0));
  const Dtype dtype = dtype_of(x, "grouped_linear takes");
  const Rows rows{x.const_data_ptr(), x.size(1), nullptr}, grads{grad_out.const_data_ptr(), outputs, nullptr};
  Tensor grad_x = nothing(x), grad_weight = nothing(x), grad_bias = nothing(x);
  if (needs.at(0)) {
    grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
    multiply(grad_out, weight, at, !transposed, nullptr, grad_x);
  }
  if (needs.at(1)) {
    grad_weight = torch::stable::new_empty(weight, {experts, weight.size(1), weight.size(2)});
    outer_products(transposed ? rows : grads, transposed ? grads : rows, grad_weight, at, dtype);
  }
  if (needs.at(2) && bias) {
    grad_bias = torch::stable::new_empty(x, {experts, outputs}, ScalarType::Float);
    sum_groups(grads, nullptr, grad_bias, at, dtype);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace accel::grouped_linear

#define ACCEL_GROUPED_LINEAR_ARGUMENTS "Tensor x, Tensor weight, Tensor? bias, Tensor offsets, bool transposed"

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def("grouped_linear_forward(" ACCEL_GROUPED_LINEAR_ARGUMENTS ") -> Tensor");
  m.def("grouped_linear_backward(Tensor grad_out, " ACCEL_GROUPED_LINEAR_ARGUMENTS
        ", bool[] needs) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("grouped_linear_forward", TORCH_BOX(&accel::grouped_linear::forward));
  m.impl("grouped_linear_backward", TORCH_BOX(&accel::grouped_linear::backward));
}
