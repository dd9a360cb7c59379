// What the bindings of grouped products do alike: checks, and handing tasks to workers.
#pragma once

#include "cpu/_binding.h"
#include "params.h"

namespace accel::grouped_linear {

// f once in as many workers as there are, or tasks; each claims tasks until none is left.
template <typename F>
void work(const Tasks& tasks, F f) {
  const int64_t workers = std::min<int64_t>(tasks.count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { f(); });
}

inline const int64_t* indices_of(const Tensor& x, const char* name) {
  check_cpu(x, name);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long, name, " must be int64");
  return static_cast<const int64_t*>(x.const_data_ptr());
}

inline void check_matrices(const Tensor& w, const Tensor& like, int64_t rows, int64_t columns, const char* name) {
  check_cpu(w, name);
  STD_TORCH_CHECK(w.dim() == 3 && w.size(1) == rows && w.size(2) == columns, name, " must be (X, ", rows, ", ", columns,
                  ")");
  STD_TORCH_CHECK(w.scalar_type() == like.scalar_type(), name, " must have the dtype of x");
}

// out (N, outputs) = rows · W of each expert, + bias; rows behind the last offset are left alone.
inline void grouped_products(const Rows& rows, const Tensor& weight, const int64_t* offsets, bool transposed,
                             const float* bias, Tensor& out, bool wide, Dtype dtype) {
  const int64_t outputs = out.size(1), experts = weight.size(0), depth = weight.size(transposed ? 1 : 2);
  Linear p{{rows, weight.const_data_ptr(), experts, outputs, depth, transposed, 0, dtype, {}},
           bias, out.mutable_data_ptr(), wide};
  Plan plan = Plan::product(offsets, experts, outputs, 1);
  p.product.tasks = plan.tasks();
  auto run = ACCEL_LEVEL(moe::grouped_linear_product);
  work(p.product.tasks, [&] { run(p); });
}

// Rows of the gradient of weights (X, a, b), as they lie, whatever they are called there.
inline void outer_products(const Rows& left, const Rows& right, Tensor& out, const int64_t* offsets, Dtype dtype) {
  Outer p{left, right, out.mutable_data_ptr(), out.size(1), out.size(2), offsets, dtype, {}};
  Plan plan = Plan::outer(out.size(0), p.outputs, p.columns);
  p.tasks = plan.tasks();
  auto run = ACCEL_LEVEL(moe::grouped_linear_outer);
  work(p.tasks, [&] { run(p); });
}

// (X, columns) fp32.
inline void sum_groups(const Rows& rows, const float* weight, Tensor& out, const int64_t* offsets, Dtype dtype) {
  Sum p{rows, weight, mutable_floats(out), out.size(1), offsets, dtype, {}};
  Plan plan = Plan::outer(out.size(0), 1, p.columns);
  p.tasks = plan.tasks();
  auto run = ACCEL_LEVEL(moe::grouped_linear_sum);
  work(p.tasks, [&] { run(p); });
}

}  // namespace accel::grouped_linear
