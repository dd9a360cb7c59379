// What all ways to multiply have in common: words, tasks, and the end of a tile.
#pragma once

#include "cpu/_fp8.h"
#include "cpu/_pack.h"
#include "params.h"

namespace accel::ACCEL_ISA::fp8 {

using namespace accel::fp8_gemm;

// Whether a's rows are multiplied as pairs of bf16: codes are such numbers exactly.
template <typename A>
constexpr bool PAIRS_OF = IN_PAIRS<bf16> && (IS_CODE<A> || std::is_same_v<A, bf16>);

// A step as words: pairs in the order of their elements, or numbers in that of steps.
template <bool PAIRS>
constexpr int STEP_VECTORS = PAIRS ? 2 : 4;

// The first n elements of one, zeros behind them.
template <bool PAIRS, typename T>
inline void load_words(const T* p, int64_t n, vf* words) {
  if constexpr (PAIRS) {
    load_step_pairs(p, n, words);
  } else {
    load_step(p, n, words);
    for (int v = 0; v < 4; ++v) words[v] *= FACTOR<T>;
  }
}

constexpr int CHUNK_LD = 144;  // words of a chunk, an odd number of cache lines

// A block of out.
struct Task {
  int64_t block, row;  // of rows, and where it begins
  int rows;
  int64_t column;
  int columns;
};

// Rows of the same columns stand side by side, as they read the same codes of b.
inline bool claim(const Params& p, Task& task) {
  const int64_t i = p.next->fetch_add(1, std::memory_order_relaxed), blocks = p.blocks();
  if (i >= p.tasks()) return false;
  const int64_t block = p.from_block + i % blocks, row = p.row_of(block), column = i / blocks * p.task_columns;
  task = {block, row, int(p.row_of(block + 1) - row), column, int(std::min(p.task_columns, p.outputs - column))};
  return true;
}

// The scales of a row of either operand.
inline const float* scales_of(const float* scales, int64_t row, int64_t rows, int64_t across) {
  return scales + row / rows * across;
}

template <typename Out>
inline void finish(const Params& p, const Task& t, float* tile, int64_t ld) {
  Out* out = static_cast<Out*>(p.out) + t.row * p.outputs + t.column;
  for (int64_t i = 0; i < t.rows; ++i, tile += ld, out += p.outputs) {
    if (p.bias)
      for (int64_t j = 0; j < t.columns; ++j) tile[j] += p.bias[t.column + j];
    store_row(out, tile, t.columns, 1.0f);
  }
}

inline void finish_tile(const Params& p, const Task& t, float* tile, int64_t ld) {
  if (p.out_dtype == Dtype::f32) finish<float>(p, t, tile, ld);
  if (p.out_dtype == Dtype::bf16) finish<bf16>(p, t, tile, ld);
  if (p.out_dtype == Dtype::f16) finish<fp16>(p, t, tile, ld);
}

}  // namespace accel::ACCEL_ISA::fp8
