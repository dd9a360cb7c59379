// What the bindings of moe_permute and moe_unpermute hand to the kernel: plain pointers and sizes, no torch type. One's
// forward is the other's backward, with weights or without.
#pragma once

#include <cstdint>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel::moe_unpermute {

struct Params {
  int64_t tokens, choices, rows, channels;  // T, K, N, C
  Dtype dtype;
  const int64_t* source;       // (N,)
  const int64_t* destination;  // (T, K)

  // Whether choice i, at row n, and row n name each other: then a choice has one row alone, whatever the plan holds.
  bool paired(int64_t i, int64_t n) const {
    return n >= 0 && n < rows && i >= 0 && i < tokens * choices && source[n] == i && destination[i] == n;
  }
};

struct Combine {
  Params p;
  const void* rows;      // (N, C)
  const float* weights;  // (T, K) or null
  void* out;             // (T, C)
};

struct Spread {
  Params p;
  const void* tokens;    // (T, C)
  const float* weights;  // (T, K) or null
  void* rows;            // (N, C)
  const void* y;         // (N, C), or null where no products are wanted
  float* products;       // (T, K), 0 before: of each token with the row of each choice in y
};

}  // namespace accel::moe_unpermute

ACCEL_DECLARE(moe_unpermute, permuting,
  void combine(const Combine& c, int64_t from, int64_t to);  // tokens
  void spread(const Spread& s, int64_t from, int64_t to);    // rows; one that is of no token is 0
)
