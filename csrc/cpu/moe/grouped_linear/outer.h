// Sums over the rows of a group: gradients of weights and of biases.
#pragma once

#include "product.h"

namespace accel::ACCEL_ISA::moe {

// Both operands are packed a chunk of rows at a time, as they lie: what is summed over is the rows.
template <typename T>
class Outers {
 public:
  explicit Outers(const Outer& p)
      : p(p),
        left(p.left),
        right(p.right),
        left_ld(spread(OUTER_ROWS)),
        right_ld(spread(TASK_COLUMNS)),
        left_packed(CHUNK * int64_t(left_ld)),
        right_packed(CHUNK * int64_t(right_ld)),
        sums(OUTER_ROWS * int64_t(right_ld)),
        two_rows(2 * vectors(int(TASK_COLUMNS))) {}

  void run() {
    while (const Task* task = claim(p.tasks)) {
      const int64_t first = p.offsets[task->expert], rows = p.offsets[task->expert + 1] - first;
      T* out = static_cast<T*>(p.out) + (task->expert * p.outputs + task->row) * p.columns + task->column;
      if (rows)
        multiply(*task, first, rows, out);
      else
        for (int64_t i = 0; i < task->rows; ++i) std::memset(out + i * p.columns, 0, size_t(task->columns) * sizeof(T));
    }
  }

 private:
  void multiply(const Task& t, int64_t first, int64_t rows, T* out) {
    const auto of_left = [&](int64_t i) { return left.at(first + i); };
    const auto of_right = [&](int64_t i) { return right.at(first + i); };
    const int columns = int(t.columns);
    const int64_t words = words_of<T>(rows);
    // fp32 sums are made where they belong: with few rows all the time goes into writing them
    const bool in_place = std::is_same_v<T, float> && columns % W == 0;
    float* const made = in_place ? reinterpret_cast<float*>(out) : sums.data();
    const int64_t ld = in_place ? p.columns : right_ld;
    for (int64_t from = 0; from < words; from += CHUNK) {
      const int count = int(std::min<int64_t>(CHUNK, words - from));
      pack_columns<T>(of_left, rows, from, count, t.row, int(t.rows), left_packed, left_ld, two_rows);
      pack_columns<T>(of_right, rows, from, count, t.column, columns, right_packed, right_ld, two_rows);
      gemm<IN_PAIRS<T>>({left_packed, 1, left_ld, right_packed, right_ld, made, ld, from ? made : nullptr, ld, count},
                        int(t.rows), vectors(columns) / W);
    }
    if (in_place) return;
    for (int64_t i = 0; i < t.rows; ++i) store_row(out + i * p.columns, sums + i * right_ld, columns, 1.0f);
  }

  const Outer& p;
  const RowsOf<T> left, right;
  const int left_ld, right_ld;
  Buffer left_packed, right_packed;
  Buffer sums;
  Buffer two_rows;
};

// In runs of 64 rows, which are added up: a long sum is rounded once a run.
template <typename T>
void sum_rows(const Sum& p) {
  const RowsOf<T> rows(p.rows);
  Buffer run(vectors(int(TASK_COLUMNS))), row(vectors(int(TASK_COLUMNS)));
  while (const Task* task = claim(p.tasks)) {
    float* out = p.out + task->expert * p.columns + task->column;
    const int columns = int(task->columns);
    std::fill_n(out, columns, 0.0f);
    const int64_t end = p.offsets[task->expert + 1];
    for (int64_t from = p.offsets[task->expert]; from < end; from += 64) {
      std::fill_n(run.data(), vectors(columns), 0.0f);
      for (int64_t r = from; r < std::min<int64_t>(from + 64, end); ++r) {
        load_row(rows.at(r) + task->column, row, columns, vectors(columns));
        const float weight = p.weight ? p.weight[r] : 1.0f;
        for (int j = 0; j < columns; j += W) store(run + j, load(run + j) + load(row + j) * weight);
      }
      for (int j = 0; j < columns; ++j) out[j] += run[j];
    }
  }
}

}  // namespace accel::ACCEL_ISA::moe
