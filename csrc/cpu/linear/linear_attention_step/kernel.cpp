// One token of linear attention: a head's state is read once, decayed, added to, written and asked.

#include "params.h"

#include <algorithm>
#include <cmath>

#include "cpu/_scratch.h"
#include "cpu/_simd.h"
#include "cpu/linear/linear_attention/maps.h"

namespace accel::ACCEL_ISA::linear_step {
namespace {

constexpr int ROW = W == 16 ? 8 : 4;  // vectors of values and as many of sums: half of the registers

void apply(Map map, float* x, int64_t padded) {
  linear::with_map(map, [&](auto feature) {
    for (int64_t i = 0; i < padded; i += W) store(x + i, feature.value(load(x + i)));
  });
}

template <typename T>
void read(const Rows& rows, int64_t entry, int64_t head, float* to, int64_t n, int64_t padded) {
  const T* from = static_cast<const T*>(rows.data) + entry * rows.batch + head * rows.head;
  if (rows.element == 1) return load_row(from, to, int(n), int(padded));
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i * rows.element]);
  for (int64_t i = n; i < padded; ++i) to[i] = 0.0f;
}

float dot(const float* a, const float* b, int64_t n) {
  vf sum{};
  int64_t i = 0;
  for (; i + W <= n; i += W) sum += load(a + i) * load(b + i);
  float rest = 0.0f;
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum_lanes(sum)[0] + rest;
}

// By rows of values: state[d] = shrink · state[d] + k[d] · v, and out = Σ q[d] · state[d], N vectors at a time.
template <int N>
void rows_of(float* state, int64_t stride, const float* k, const float* v, const float* q, float shrink, float* out,
             int64_t features) {
  vf values[N], sums[N]{};
  for (int i = 0; i < N; ++i) values[i] = load(v + i * W);
  for (int64_t d = 0; d < features; ++d) {
    float* row = state + d * stride;
    for (int i = 0; i < N; ++i) {
      const vf now = load(row + i * W) * shrink + values[i] * k[d];
      store(row + i * W, now);
      sums[i] += now * q[d];
    }
  }
  for (int i = 0; i < N; ++i) store(out + i * W, sums[i]);
}

// The same of less than a vector.
void rest_of_rows(float* state, int64_t stride, const float* k, const float* v, const float* q, float shrink,
                  float* out, int64_t features, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = 0.0f;
  for (int64_t d = 0; d < features; ++d) {
    float* row = state + d * stride;
    for (int64_t i = 0; i < count; ++i) {
      row[i] = row[i] * shrink + v[i] * k[d];
      out[i] += row[i] * q[d];
    }
  }
}

void by_rows(float* state, const float* k, const float* v, const float* q, float shrink, float* out, int64_t features,
             int64_t values) {
  int64_t at = 0;
  for (; at + ROW * W <= values; at += ROW * W)
    rows_of<ROW>(state + at, values, k, v + at, q, shrink, out + at, features);
  for (; at + 4 * W <= values; at += 4 * W) rows_of<4>(state + at, values, k, v + at, q, shrink, out + at, features);
  for (; at + 2 * W <= values; at += 2 * W) rows_of<2>(state + at, values, k, v + at, q, shrink, out + at, features);
  for (; at + W <= values; at += W) rows_of<1>(state + at, values, k, v + at, q, shrink, out + at, features);
  if (at < values) rest_of_rows(state + at, values, k, v + at, q, shrink, out + at, features, values - at);
}

// By columns, each a row of features: state[e] = shrink · state[e] + v[e] · k, and out[e] = q · state[e], N at a time.
template <int N>
void columns_of(float* state, const float* k, const float* v, const float* q, float shrink, float* out,
                int64_t features) {
  vf sums[N]{};
  int64_t i = 0;
  for (; i + W <= features; i += W) {
    const vf keys = load(k + i), queries = load(q + i);
    for (int e = 0; e < N; ++e) {
      float* to = state + e * features + i;
      const vf now = load(to) * shrink + keys * v[e];
      store(to, now);
      sums[e] += now * queries;
    }
  }
  for (int e = 0; e < N; ++e) {
    float sum = sum_lanes(sums[e])[0];
    for (int64_t j = i; j < features; ++j) {
      float& x = state[e * features + j];
      x = x * shrink + k[j] * v[e];
      sum += x * q[j];
    }
    out[e] = sum;
  }
}

void by_columns(float* state, const float* k, const float* v, const float* q, float shrink, float* out,
                int64_t features, int64_t values) {
  int64_t e = 0;
  for (; e + 4 <= values; e += 4) columns_of<4>(state + e * features, k, v + e, q, shrink, out + e, features);
  for (; e < values; ++e) columns_of<1>(state + e * features, k, v + e, q, shrink, out + e, features);
}

// What another query of the same state gets.
void ask(const Params& p, const float* state, const float* q, float* out) {
  if (p.by_columns) {
    for (int64_t e = 0; e < p.values; ++e) out[e] = dot(state + e * p.features, q, p.features);
    return;
  }
  std::fill(out, out + p.values, 0.0f);
  for (int64_t d = 0; d < p.features; ++d) {
    const float* row = state + d * p.values;
    int64_t e = 0;
    for (; e + W <= p.values; e += W) store(out + e, load(out + e) + load(row + e) * q[d]);
    for (; e < p.values; ++e) out[e] += row[e] * q[d];
  }
}

template <typename T>
void run(const Params& p, int64_t from, int64_t to) {
  const int64_t features = round_up(p.features, W), values = round_up(p.values, W);
  Buffer memory(2 * features + 2 * values);
  float *q = memory.data(), *k = q + features, *v = k + features, *out = v + values;
  const FlushSubnormals flush;
  const int64_t group = p.heads / p.state_heads;
  for (int64_t task = from; task < to; ++task) {
    const int64_t b = task / p.state_heads, s = task % p.state_heads;
    read<T>(p.k, b, s * p.k.heads / p.state_heads, k, p.features, features);
    read<T>(p.v, b, s * p.v.heads / p.state_heads, v, p.values, values);
    apply(p.map, k, features);
    const float shrink = p.decay ? std::exp(p.decay[b * p.decay_batch + s * p.decay_head]) : 1.0f;
    float* state = p.kv + b * p.kv_batch + s * p.kv_head;
    float* sum = p.k_sum ? p.k_sum + b * p.sum_batch + s * p.sum_head : nullptr;
    if (sum) {
      for (int64_t d = 0; d < p.features; ++d) sum[d] = sum[d] * shrink + k[d];
    }
    for (int64_t i = 0; i < group; ++i) {
      const int64_t h = s * group + i;
      read<T>(p.q, b, h * p.q.heads / p.heads, q, p.features, features);
      apply(p.map, q, features);
      if (i > 0) {
        ask(p, state, q, out);
      } else if (p.by_columns) {
        by_columns(state, k, v, q, shrink, out, p.features, p.values);
      } else {
        by_rows(state, k, v, q, shrink, out, p.features, p.values);
      }
      float factor = p.scale;
      if (sum) {
        const float den = p.scale * dot(q, sum, p.features) + p.eps;
        factor = den == 0.0f ? 0.0f : p.scale / den;
      }
      store_row(static_cast<T*>(p.out) + (b * p.heads + h) * p.values, out, int(p.values), factor);
    }
  }
}

}  // namespace

void update(const Params& p, int64_t from, int64_t to) {
  switch (p.dtype) {
    case Dtype::f32: return run<float>(p, from, to);
    case Dtype::bf16: return run<bf16>(p, from, to);
    case Dtype::f16: return run<fp16>(p, from, to);
  }
}

}  // namespace accel::ACCEL_ISA::linear_step
