// What the binding of fp8_gemm hands to the kernel: plain pointers and sizes, no torch type.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel::fp8_gemm {

enum class Kind : int { f32, bf16, f16, e4m3, e5m2 };

// Columns that are summed up in one go, then multiplied with their scales.
struct Chunk {
  int64_t from;
  int count;
  int64_t scale;
};

constexpr int64_t CHUNK = 128;  // the most columns of one
constexpr int64_t FEW_ROWS = 8;  // whose products wait for the codes of b, which are decoded in registers
constexpr int64_t TASK_ROWS = 128, TASK_COLUMNS = 256, FEW_COLUMNS = 64;

// out (rows, outputs) = a · bᵀ, + bias. b is (outputs, depth) or, `turned`, (depth, outputs).
struct Params {
  const void *a, *b;
  Kind a_kind, b_kind;
  bool turned;
  int64_t rows, outputs, depth;
  const float *a_scale, *b_scale;  // a_scale null: of plain numbers
  int64_t a_rows, b_rows, scales;  // rows of a block, blocks across
  const float* bias;
  void* out;
  Dtype out_dtype;
  const Chunk* chunks;
  int64_t count;  // of chunks
  int64_t task_columns;
  std::atomic<int64_t>* next;  // task, which workers claim one by one

  bool few() const { return rows <= FEW_ROWS && !turned; }
  int64_t row_blocks() const { return (rows + TASK_ROWS - 1) / TASK_ROWS; }
  int64_t tasks() const { return row_blocks() * ((outputs + task_columns - 1) / task_columns); }
};

}  // namespace accel::fp8_gemm

ACCEL_DECLARE(fp8_gemm, fp8,
  void multiply(const Params& p);  // what one worker does
)
