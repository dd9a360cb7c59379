// Grouped linear layers on the CPU, one instruction-set level: see product.h and outer.h.

#include "outer.h"

namespace accel::ACCEL_ISA::moe {

template <typename T, typename Out>
void linear(const Linear& p) {
  Products<T>(p.product).run([&](const Task& t, float* tile, int ld, int) {
    Out* out = static_cast<Out*>(p.out) + t.row * p.product.outputs + t.column;
    for (int64_t i = 0; i < t.rows; ++i, tile += ld, out += p.product.outputs) {
      if (p.bias) {
        const float* bias = p.bias + t.expert * p.product.outputs + t.column;
        for (int64_t j = 0; j < t.columns; ++j) tile[j] += bias[j];
      }
      store_row(out, tile, int(t.columns), 1.0f);
    }
  });
}

template <typename T>
void linear(const Linear& p) {
  p.wide ? linear<T, float>(p) : linear<T, T>(p);
}

void grouped_linear_product(const Linear& p) {
  [[maybe_unused]] FlushSubnormals flush;
  if (p.product.dtype == Dtype::f32) linear<float>(p);
  if (p.product.dtype == Dtype::bf16) linear<bf16>(p);
  if (p.product.dtype == Dtype::f16) linear<fp16>(p);
}

void grouped_linear_outer(const Outer& p) {
  [[maybe_unused]] FlushSubnormals flush;
  if (p.dtype == Dtype::f32) Outers<float>(p).run();
  if (p.dtype == Dtype::bf16) Outers<bf16>(p).run();
  if (p.dtype == Dtype::f16) Outers<fp16>(p).run();
}

void grouped_linear_sum(const Sum& p) {
  [[maybe_unused]] FlushSubnormals flush;
  if (p.dtype == Dtype::f32) sum_rows<float>(p);
  if (p.dtype == Dtype::bf16) sum_rows<bf16>(p);
  if (p.dtype == Dtype::f16) sum_rows<fp16>(p);
}

}  // namespace accel::ACCEL_ISA::moe
