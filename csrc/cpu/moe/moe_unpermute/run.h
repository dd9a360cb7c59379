// What the bindings of moe_permute and moe_unpermute do alike: checks, memory, threads.
#pragma once

#include <algorithm>

#include "cpu/_binding.h"
#include "params.h"

namespace accel::moe_unpermute {

constexpr int64_t GRAIN = 1 << 15;  // elements of rows worth a task

// `like` is of (rows or tokens, channels).
inline Params describe(const Tensor& like, const Tensor& source, const Tensor& destination) {
  check_cpu(like, "rows");
  check_cpu(source, "source");
  check_cpu(destination, "destination");
  STD_TORCH_CHECK(like.dim() == 2 && source.dim() == 1 && destination.dim() == 2 &&
                      source.scalar_type() == ScalarType::Long && destination.scalar_type() == ScalarType::Long,
                  "rows must be (N, C), source int64 (N,), destination int64 (T, K)");
  Params p{};
  p.tokens = destination.size(0), p.choices = destination.size(1), p.rows = source.size(0), p.channels = like.size(1);
  p.dtype = dtype_of(like, "rows are made of");
  p.source = static_cast<const int64_t*>(source.const_data_ptr());
  p.destination = static_cast<const int64_t*>(destination.const_data_ptr());
  return p;
}

inline void check_sizes(const Tensor& x, const char* name, int64_t rows, const Params& p) {
  check_cpu(x, name);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == p.channels && dtype_of(x, name) == p.dtype, name,
                  " must be (", rows, ", ", p.channels, ") of the other's dtype");
}

template <typename Run>
void in_parts(int64_t count, int64_t elements, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, elements));
  if (count <= grain) return run(0, count);
  torch::stable::parallel_for(0, count, grain, run);
}

inline Tensor run_combine(const Params& p, const Tensor& rows, const OptionalTensor& weights) {
  check_sizes(rows, "rows", p.rows, p);
  check_f32(weights, "weights", p.tokens * p.choices);
  Tensor out = torch::stable::new_empty(rows, {p.tokens, p.channels});
  const Combine c{p, rows.const_data_ptr(), data_or_null(weights), out.mutable_data_ptr()};
  const auto run = ACCEL_LEVEL(permuting::combine);
  in_parts(p.tokens, p.choices * p.channels, [&](int64_t from, int64_t to) { run(c, from, to); });
  return out;
}

// `products` of tokens and rows of y are made where y is given.
inline Tensor run_spread(const Params& p, const Tensor& tokens, const OptionalTensor& weights, const OptionalTensor& y,
                         float* products) {
  check_sizes(tokens, "tokens", p.tokens, p);
  check_f32(weights, "weights", p.tokens * p.choices);
  if (y) check_sizes(*y, "y", p.rows, p);
  Tensor rows = torch::stable::new_empty(tokens, {p.rows, p.channels});
  const Spread s{p, tokens.const_data_ptr(), data_or_null(weights), rows.mutable_data_ptr(),
                 y ? y->const_data_ptr() : nullptr, y ? products : nullptr};
  if (y) std::fill(products, products + p.tokens * p.choices, 0.0f);
  const auto run = ACCEL_LEVEL(permuting::spread);
  in_parts(p.rows, p.channels, [&](int64_t from, int64_t to) { run(s, from, to); });
  return rows;
}

}  // namespace accel::moe_unpermute
