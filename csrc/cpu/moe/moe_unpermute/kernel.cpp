// Rows of tokens to rows of experts and back. What is written is walked in order, new memory a page at a time, and what
// is read is gathered; sums of a token's K rows are in fp32, in the order of k.

#include "params.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/_scratch.h"
#include "cpu/_simd.h"

namespace accel::ACCEL_ISA::permuting {
namespace {

template <typename T>
void combine_of(const Combine& c, int64_t from, int64_t to) {
  const Params& p = c.p;
  const int64_t C = p.channels, K = p.choices;
  std::vector<const T*> rows(static_cast<size_t>(K));
  std::vector<float> factors(static_cast<size_t>(K));
  for (int64_t t = from; t < to; ++t) {
    size_t count = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t n = p.destination[t * K + k];
      if (n < 0 || n >= p.rows) continue;
      rows[count] = static_cast<const T*>(c.rows) + n * C;
      factors[count++] = c.weights ? c.weights[t * K + k] : 1.0f;
    }
    T* out = static_cast<T*>(c.out) + t * C;
    int64_t i = 0;
    for (; i + 2 * W <= C; i += 2 * W) {
      vf a{}, b{};
      for (size_t k = 0; k < count; ++k) {
        vf x, y;
        load_two(rows[k] + i, x, y);
        a += x * factors[k], b += y * factors[k];
      }
      store_two(out + i, a, b);
    }
    for (; i < C; ++i) {
      float sum = 0.0f;
      for (size_t k = 0; k < count; ++k) sum += to_float(rows[k][i]) * factors[k];
      from_float(sum, out + i);
    }
  }
}

template <typename T>
float product(const T* a, const T* b, int64_t n) {
  vf sum{}, more{};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    vf x, y, u, v;
    load_two(a + i, x, y);
    load_two(b + i, u, v);
    sum += x * u, more += y * v;
  }
  float rest = 0.0f;
  for (; i < n; ++i) rest += to_float(a[i]) * to_float(b[i]);
  return sum_lanes(sum + more)[0] + rest;
}

template <typename T>
void scaled(T* to, const T* from, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    vf x, y;
    load_two(from + i, x, y);
    store_two(to + i, x * factor, y * factor);
  }
  for (; i < n; ++i) from_float(to_float(from[i]) * factor, to + i);
}

template <typename T>
void spread_of(const Spread& s, int64_t from, int64_t to) {
  const Params& p = s.p;
  const int64_t C = p.channels, K = p.choices;
  for (int64_t n = from; n < to; ++n) {
    T* row = static_cast<T*>(s.rows) + n * C;
    const int64_t i = p.source[n];
    if (!p.paired(i, n)) {
      std::memset(row, 0, size_t(C) * sizeof(T));
      continue;
    }
    const T* token = static_cast<const T*>(s.tokens) + i / K * C;
    if (s.weights) {
      scaled(row, token, s.weights[i], C);
    } else {
      std::memcpy(row, token, size_t(C) * sizeof(T));
    }
    if (s.products) s.products[i] = product(token, static_cast<const T*>(s.y) + n * C, C);
  }
}

}  // namespace

void combine(const Combine& c, int64_t from, int64_t to) {
  switch (c.p.dtype) {
    case Dtype::f32: return combine_of<float>(c, from, to);
    case Dtype::bf16: return combine_of<bf16>(c, from, to);
    case Dtype::f16: return combine_of<fp16>(c, from, to);
  }
}

void spread(const Spread& s, int64_t from, int64_t to) {
  switch (s.p.dtype) {
    case Dtype::f32: return spread_of<float>(s, from, to);
    case Dtype::bf16: return spread_of<bf16>(s, from, to);
    case Dtype::f16: return spread_of<fp16>(s, from, to);
  }
}

}  // namespace accel::ACCEL_ISA::permuting
