// What the binding of linear_attention_step hands to the kernel: plain pointers and sizes, no torch type.
#pragma once

#include <cstdint>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"
#include "cpu/linear/linear_attention/params.h"

namespace accel::linear_attention_step {

using linear_attention::Map;

// Rows of one token: of entry b and head h at data + b·batch + h·head, elements `element` apart.
struct Rows {
  const void* data;
  int64_t heads, batch, head, element;
};

struct Params {
  Rows q, k, v;
  int64_t heads, state_heads, features, values;  // H, Hs, D, E
  Dtype dtype;
  Map map;
  float scale, eps;
  float* kv;  // (B, Hs, D, E): of a head D·E floats without gaps, by rows of values or, `by_columns`, of features
  int64_t kv_batch, kv_head;
  bool by_columns;
  float* k_sum;  // (B, Hs, D) or null
  int64_t sum_batch, sum_head;
  const float* decay;  // of entry b and head h at b·decay_batch + h·decay_head; or null
  int64_t decay_batch, decay_head;
  void* out;  // (B, H, 1, E) contiguous
};

}  // namespace accel::linear_attention_step

ACCEL_DECLARE(linear_attention_step, linear_step,
  void update(const Params& p, int64_t from, int64_t to);  // heads of states, of all entries
)
