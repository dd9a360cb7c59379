// Checks that protect memory. Messages for users come from Python; these hold whoever calls the native op.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace accel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Bools = std::vector<bool>;

inline void check_cpu(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), name, " must be a contiguous CPU tensor");
}

inline void check_f32(const OptionalTensor& x, const char* name, int64_t numel) {
  if (!x) return;
  check_cpu(*x, name);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(x->numel() == numel, name, " must have ", numel, " elements, has ", x->numel());
}

inline const float* data_or_null(const OptionalTensor& x) {
  return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr;
}

inline float* mutable_floats(Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

}  // namespace accel
