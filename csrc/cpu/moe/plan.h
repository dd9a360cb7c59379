// Which choice goes to which row where choices are sorted by expert; accel/ops/moe/plan.py defines it.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "sort.h"

namespace accel::moe {

struct Plan {
  Tensor source, destination, counts, offsets;
};

// The plan of `indices` (T, K), int64. With `weights`, float32 of that shape, those of the largest keep their rows.
inline Plan make_plan(const Tensor& indices, const OptionalTensor& weights, int64_t experts, int64_t capacity,
                      int64_t align, int64_t rows) {
  check_cpu(indices, "indices");
  STD_TORCH_CHECK(indices.dim() == 2 && indices.scalar_type() == ScalarType::Long, "indices must be int64 (T, K)");
  STD_TORCH_CHECK(experts > 0 && capacity >= -1 && align > 0 && rows >= 0, "sizes of a plan are out of range");
  check_f32(weights, "weights", indices.numel());
  const planning::Sizes sizes{indices.numel(), experts, capacity, align, rows};
  Plan plan{torch::stable::new_empty(indices, {rows}), torch::stable::new_empty(indices, {indices.size(0), indices.size(1)}),
            torch::stable::new_empty(indices, {experts}), torch::stable::new_empty(indices, {experts + 1})};
  const auto numbers = [](Tensor& x) { return static_cast<int64_t*>(x.mutable_data_ptr()); };
  const int64_t* of = static_cast<const int64_t*>(indices.const_data_ptr());
  std::vector<int64_t> kept;
  if (weights && capacity >= 0) {
    kept = planning::drop_smallest(of, data_or_null(weights), sizes);
    of = kept.data();
  }
  planning::sort(of, sizes, numbers(plan.source), numbers(plan.destination), numbers(plan.counts), numbers(plan.offsets));
  return plan;
}

}  // namespace accel::moe
