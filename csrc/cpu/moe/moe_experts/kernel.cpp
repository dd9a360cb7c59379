// The experts of a mixture on the CPU, one instruction-set level: the products of grouped_linear between a gather and
// epilogues. See gate.h for the activation.

#include "gate.h"

#include "cpu/moe/grouped_linear/product.h"

namespace accel::ACCEL_ISA::moe {

constexpr int64_t UNITS = TASK_COLUMNS;  // the most activations of a task

// --- forward ---

template <typename T>
void first(const First& p) {
  const Gate& gate = p.gate;
  const int64_t all = gate.outputs();
  Buffer active(UNITS), gates(UNITS), ups(UNITS);
  Products<T>(p.product).run([&](const Task& t, float* tile, int ld, int second) {
    const bool turns = gate.interleaved;
    const int outputs = int(t.columns), units = turns ? outputs / 2 : outputs, parts = gate.gated && !turns ? 2 : 1;
    const int64_t unit = turns ? t.column / 2 : t.column;
    for (int64_t i = 0; i < t.rows; ++i, tile += ld) {
      for (int s = 0; s < parts; ++s) {
        float* made = tile + s * second;
        const int64_t column = t.column + s * gate.inner;
        if (p.bias)
          for (int j = 0; j < outputs; ++j) made[j] += p.bias[t.expert * all + column + j];
        if (p.hidden) store_row(static_cast<T*>(p.hidden) + (t.row + i) * all + column, made, outputs, 1.0f);
      }
      if (turns) part(tile, gates, ups, units);
      with_function(gate.function, [&](auto f) {
        activate<f>(gate, turns ? gates : tile, turns ? ups : tile + second, active, vectors(units));
      });
      store_row(static_cast<T*>(p.active) + (t.row + i) * gate.inner + unit, active.data(), units, 1.0f);
    }
  });
}

// --- backward ---

template <typename T>
class BehindRows {
 public:
  explicit BehindRows(const Behind& p) : p(p), gates(UNITS), ups(UNITS), turns(2 * UNITS), weighed(UNITS) {}

  // `d` (rows × ld), or null, is of the task's columns, which count activations.
  void run(const Task& t, float* d, int ld) {
    const Gate& gate = p.gate;
    const int64_t all = gate.outputs(), block = t.column / FEW_COLUMNS;
    const int units = int(t.columns), padded = vectors(units);
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t row = t.row + i, at = row * all;
      const T* hidden = static_cast<const T*>(p.hidden) + at;
      if (gate.interleaved) {
        load_row(hidden + 2 * t.column, turns.data(), 2 * units, vectors(2 * units));
        part(turns, gates, ups, units);
        for (int j = units; j < padded; ++j) gates[j] = ups[j] = 0.0f;
      } else {
        load_row(hidden + t.column, gates.data(), units, padded);
        if (gate.gated) load_row(hidden + gate.inner + t.column, ups.data(), units, padded);
      }
      float* made = d ? d + i * ld : nullptr;
      if (made) std::fill(made + units, made + padded, 0.0f);
      float dot = 0.0f;
      with_function(gate.function, [&](auto f) {
        dot = activate_backward<f>(gate, made, p.weights[row], gates, ups, weighed, padded);
      });
      if (p.weighed) store_row(static_cast<T*>(p.weighed) + row * gate.inner + t.column, weighed.data(), units, 1.0f);
      if (p.dots) p.dots[block * p.rows + row] = dot;
      if (!p.grad_hidden) continue;
      T* out = static_cast<T*>(p.grad_hidden) + at;
      if (gate.interleaved) {
        join(gates, ups, turns, units);
        store_row(out + 2 * t.column, turns.data(), 2 * units, 1.0f);
      } else {
        store_row(out + t.column, gates.data(), units, 1.0f);
        if (gate.gated) store_row(out + gate.inner + t.column, ups.data(), units, 1.0f);
      }
    }
  }

 private:
  const Behind& p;
  Buffer gates, ups, turns, weighed;
};

template <typename T>
void behind(const Behind& p) {
  BehindRows<T> rows(p);
  if (p.product.weight)
    Products<T>(p.product).run([&](const Task& t, float* tile, int ld, int) { rows.run(t, tile, ld); });
  else
    while (const Task* task = claim(p.product.tasks)) rows.run(*task, nullptr, 0);
}

// --- between choices and tokens; a task's rows are tokens ---

template <typename T>
void combine(const Combine& p) {
  Buffer sum(vectors(int(p.columns)));
  while (const Task* task = claim(p.tasks)) {
    for (int64_t t = task->row; t < task->row + task->rows; ++t) {
      std::fill_n(sum.data(), p.columns, 0.0f);
      for (int64_t i = t * p.choices; i < (t + 1) * p.choices; ++i) {
        if (p.place[i] < 0) continue;
        const float* row = p.rows + p.place[i] * p.columns;
        const float weight = p.weights ? p.weights[i] : 1.0f;
        int64_t j = 0;
        for (; j + W <= p.columns; j += W) store(sum + j, load(sum + j) + load(row + j) * weight);
        for (; j < p.columns; ++j) sum[j] += row[j] * weight;
      }
      store_row(static_cast<T*>(p.out) + t * p.columns, sum.data(), int(p.columns), 1.0f);
    }
  }
}

template <typename T>
void router(const Router& p) {
  const int padded = vectors(int(p.columns));
  Buffer grad(p.bias ? padded : 0);
  while (const Task* task = claim(p.tasks)) {
    for (int64_t t = task->row; t < task->row + task->rows; ++t) {
      if (p.bias) load_row(static_cast<const T*>(p.grad_out) + t * p.columns, grad.data(), int(p.columns), padded);
      for (int64_t i = t * p.choices; i < (t + 1) * p.choices; ++i) {
        float sum = 0.0f;
        if (p.place[i] >= 0) {
          for (int64_t block = 0; block < p.blocks; ++block) sum += p.dots[block * p.rows + p.place[i]];
          if (p.bias) {
            const float* bias = p.bias + p.indices[i] * p.columns;
            vf dot{};
            int64_t j = 0;
            for (; j + W <= p.columns; j += W) dot += load(grad + j) * load(bias + j);
            float rest = sum_lanes(dot)[0];
            for (; j < p.columns; ++j) rest += grad[j] * bias[j];
            sum += rest;
          }
        }
        p.out[i] = sum;
      }
    }
  }
}

// --- by dtype ---

template <typename F>
void with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::f32) f(float{});
  if (dtype == Dtype::bf16) f(bf16{});
  if (dtype == Dtype::f16) f(fp16{});
}

void moe_experts_first(const First& p) {
  [[maybe_unused]] FlushSubnormals flush;
  with_dtype(p.product.dtype, [&](auto x) { first<decltype(x)>(p); });
}

void moe_experts_behind(const Behind& p) {
  [[maybe_unused]] FlushSubnormals flush;
  with_dtype(p.product.dtype, [&](auto x) { behind<decltype(x)>(p); });
}

void moe_experts_combine(const Combine& p) {
  [[maybe_unused]] FlushSubnormals flush;
  with_dtype(p.dtype, [&](auto x) { combine<decltype(x)>(p); });
}

void moe_experts_router(const Router& p) {
  [[maybe_unused]] FlushSubnormals flush;
  with_dtype(p.dtype, [&](auto x) { router<decltype(x)>(p); });
}

}  // namespace accel::ACCEL_ISA::moe
