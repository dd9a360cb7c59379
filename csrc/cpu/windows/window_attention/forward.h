// Forward: weights of a block of rows, then their sums of v, scattered back to the tokens.
#pragma once

#include "core.h"

namespace accel::ACCEL_ISA::window {

template <typename T, bool PAIRS>
void forward(const Params& p, int64_t from, int64_t to) {
  Core<T, PAIRS> core(p);
  Weights<PAIRS> weights(core.block, core.ld);
  const int N = core.N, D = core.D, Dp = core.Dp, ld = core.ld;
  Buffer o(int64_t(core.block) * Dp);
  for (int64_t task = from; task < to; ++task) {
    int64_t index = task / p.heads;
    int h = int(task % p.heads);
    core.gather(index, h);
    const int64_t next = std::min(task + 1, to - 1);
    core.look_ahead(next / p.heads, int(next % p.heads));
    T* base = static_cast<T*>(p.out) + int64_t(h) * D;
    for (int first = 0; first < N; first += core.block) {
      int rows = std::min(core.block, N - first);
      core.weights(first, rows);
      if (p.dropout)
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < N; ++j) core.logits[int64_t(i) * ld + j] *= core.keep(index, first + i, j);
      weights.take(core.logits, ld, rows, 0, N);
      gemm<PAIRS>(weights.times(core.v_summed, 0, N, o, Dp, nullptr), rows, Dp / W);
      for (int i = 0; i < rows; ++i) {
        int64_t row = core.window.row(first + i);
        if (row >= 0) store_row(base + row * core.channels, o + int64_t(i) * Dp, D, 1.0f / core.row_sum[first + i]);
      }
    }
    float* lse = p.lse + task * N;
    for (int n = 0; n < ld; n += W)
      store(core.row_max + n, (load(core.row_max + n) + log2_positive(load(core.row_sum + n))) * LN_2);
    std::memcpy(lse, core.row_max, size_t(N) * sizeof(float));
  }
}

}  // namespace accel::ACCEL_ISA::window
