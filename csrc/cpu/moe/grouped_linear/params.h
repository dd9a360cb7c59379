// What a binding hands to the kernels: plain pointers and sizes, no torch type. Both ops of grouped products use it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel::grouped_linear {

// Rows sorted by expert. Row r lies at data + index[r] · ld, or r · ld where there is no index.
struct Rows {
  const void* data;
  int64_t ld;
  const int64_t* index;
};

// A block of one expert's rows and of outputs.
struct Task {
  int64_t expert, row, rows, column, columns;
};

// Tasks that workers claim one by one: groups differ in size, and a run of them may be all the work there is. Which worker
// gets a task changes no sum.
struct Tasks {
  const Task* list;
  int64_t count;
  std::atomic<int64_t>* next;
};

// y = x · W of each expert. W is (X, outputs, depth) or, transposed, (X, depth, outputs). With `second`, a task's columns
// are those beginning at `column` and as many that begin `second` behind: the gate's outputs and the projection's that
// they multiply.
struct Product {
  Rows x;
  const void* weight;
  int64_t experts, outputs, depth;
  bool transposed;
  int64_t second;
  Dtype dtype;
  Tasks tasks;
};

// G (X, outputs, columns) = the sum over each expert's rows of left · rightᵀ. A task's `column` counts columns of G, its
// `row` rows of G.
struct Outer {
  Rows left, right;
  void* out;
  int64_t outputs, columns;
  const int64_t* offsets;
  Dtype dtype;
  Tasks tasks;
};

// Sums over each expert's rows, (X, columns) fp32; row r counts weight[r] times where there are weights. A task's
// columns.
struct Sum {
  Rows rows;
  const float* weight;
  float* out;
  int64_t columns;
  const int64_t* offsets;
  Dtype dtype;
  Tasks tasks;
};

// out (N, outputs) = rows of the product + bias (X, outputs), in the dtype of x or, `wide`, in fp32.
struct Linear {
  Product product;
  const float* bias;
  void* out;
  bool wide;
};

// --- how the work is cut: by sizes alone ---

constexpr int64_t TASK_ROWS = 128, TASK_COLUMNS = 256, FEW_COLUMNS = 64, OUTER_ROWS = 96;
constexpr int64_t FEW_ROWS = 8;  // of a group: whose products wait for the weights, which are read where they lie

class Plan {
 public:
  // Blocks of each group's rows, and of `columns` outputs, `width` of which make TASK_COLUMNS columns of weights.
  static Plan product(const int64_t* offsets, int64_t experts, int64_t columns, int64_t spans) {
    Plan plan;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t rows = offsets[e + 1] - offsets[e], blocks = (rows + TASK_ROWS - 1) / TASK_ROWS;
      if (rows == 0) continue;
      const int64_t width = (rows <= FEW_ROWS ? FEW_COLUMNS : TASK_COLUMNS) / spans;
      for (int64_t c = 0; c < columns; c += width)
        for (int64_t b = 0, row = 0; b < blocks; ++b) {  // side by side, as they read the same weights
          const int64_t count = (rows - row + blocks - b - 1) / (blocks - b);
          plan.list_.push_back({e, offsets[e] + row, count, c, std::min(width, columns - c)});
          row += count;
        }
    }
    return plan;
  }

  // Blocks of every expert's matrix.
  static Plan outer(int64_t experts, int64_t outputs, int64_t columns) {
    Plan plan;
    for (int64_t e = 0; e < experts; ++e)
      for (int64_t row = 0; row < outputs; row += OUTER_ROWS)
        for (int64_t c = 0; c < columns; c += TASK_COLUMNS)
          plan.list_.push_back(
              {e, row, std::min(OUTER_ROWS, outputs - row), c, std::min(TASK_COLUMNS, columns - c)});
    return plan;
  }

  // Runs of `each` rows.
  static Plan rows(int64_t count, int64_t each) {
    Plan plan;
    for (int64_t row = 0; row < count; row += each) plan.list_.push_back({0, row, std::min(each, count - row), 0, 0});
    return plan;
  }

  Tasks tasks() { return {list_.data(), int64_t(list_.size()), &next_}; }

  Plan() = default;
  Plan(Plan&& other) : list_(std::move(other.list_)) {}

 private:
  std::vector<Task> list_;
  std::atomic<int64_t> next_{0};
};

}  // namespace accel::grouped_linear

ACCEL_DECLARE(grouped_linear, moe,
  void grouped_linear_product(const Linear& p);
  void grouped_linear_outer(const Outer& p);
  void grouped_linear_sum(const Sum& p);
)
