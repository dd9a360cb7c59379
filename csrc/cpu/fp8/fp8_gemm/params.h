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
constexpr int64_t TASK_ROWS = 256, TASK_COLUMNS = 256, LEAST_COLUMNS = 64;
constexpr int64_t PACKED_BLOCKS = 8;  // of rows, at most that many of which are packed at a time

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
  float* panels;  // what pack makes of the rows of these blocks; null where they are not packed
  int64_t from_block, end_block;  // of rows, whose products are made
  std::atomic<int64_t>* next;     // task, which workers claim one by one

  bool few() const { return rows <= FEW_ROWS && !turned; }
  bool packed() const { return rows > FEW_ROWS && !turned; }
  int64_t row_blocks() const { return (rows + TASK_ROWS - 1) / TASK_ROWS; }
  int64_t row_of(int64_t block) const { return rows * block / row_blocks(); }  // where one begins
  int64_t block_rows() const { return (rows + row_blocks() - 1) / row_blocks(); }  // the most rows of one
  int64_t blocks() const { return end_block - from_block; }
  int64_t tasks() const { return blocks() * ((outputs + task_columns - 1) / task_columns); }
};

}  // namespace accel::fp8_gemm

ACCEL_DECLARE(fp8_gemm, fp8,
  int64_t panel_words(const Params& p);  // of a block of rows and a chunk
  void pack(const Params& p, int64_t from, int64_t to);  // ranges of the chunks of all blocks of rows
  void multiply(const Params& p);  // what one worker does
)
