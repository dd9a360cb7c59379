// Matrix products and swapped axes between kernels, for bindings: torch's products, as it has them on every GPU.
#pragma once

#include <array>

#include <torch/csrc/stable/ops.h>

#include "cuda/_binding.h"
#include "cuda/_layout.h"

namespace accel {

// An op of torch by name; an op with an out argument returns that.
template <class... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Part of the memory of `x`, which must live on: from element `at` of its own, as (batch, rows, columns).
struct Part {
  int64_t at;
  std::array<int64_t, 3> size, stride;
};

inline Tensor part_of(const Tensor& x, const Part& part) {
  auto* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr())) + part.at * int64_t(x.element_size());
  return torch::stable::from_blob(data, {part.size.data(), 3}, {part.stride.data(), 3}, x.device(), x.scalar_type());
}

// out = a · b, batch by batch. Sums are in fp32; an out in fp32 receives them unrounded.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (out.scalar_type() == a.scalar_type())
    call("aten::bmm", "out", a, b, out);
  else if (a.is_cpu())  // has no such product
    call("aten::bmm", "out", torch::stable::to(a, out.scalar_type()), torch::stable::to(b, out.scalar_type()), out);
  else
    call("aten::bmm", "dtype_out", a, b, out.scalar_type(), out);
}

// (images, rows, columns) to (images, columns, rows).
inline Tensor swapped(const Tensor& x, int64_t images, int64_t rows, int64_t columns, void* stream) {
  Tensor out = torch::stable::new_empty(x, {images, columns, rows});
  Transpose p{x.const_data_ptr(), out.mutable_data_ptr(), images, int32_of(rows, "rows"), int32_of(columns, "columns"),
              int32_t(x.element_size())};
  check_launch(accel_transpose(&p, stream), "swapping axes");
  return out;
}

}  // namespace accel
