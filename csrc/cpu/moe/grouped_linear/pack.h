// Operands of grouped products in words: where weights come from, and rows that are gathered while they are packed.
#pragma once

#include <cstring>

#include "cpu/_pack.h"
#include "params.h"

namespace accel::ACCEL_ISA::moe {

using namespace accel::grouped_linear;

constexpr int CHUNK = 128;  // words that are summed up in one go

template <typename T>
constexpr int PER_WORD = IN_PAIRS<T> ? 2 : 1;

template <typename T>
int64_t words_of(int64_t elements) {
  return (elements + PER_WORD<T> - 1) / PER_WORD<T>;
}

template <typename T>
struct RowsOf {
  explicit RowsOf(const Rows& r) : data(static_cast<const T*>(r.data)), ld(r.ld), index(r.index) {}
  const T* at(int64_t row) const { return data + (index ? index[row] : row) * ld; }

  const T* data;
  int64_t ld;
  const int64_t* index;
};

// Words [from, from + count) of a row of `size` elements, zeros behind them up to whole vectors.
template <typename T>
inline void pack_row(const T* row, int64_t size, int64_t from, int count, float* dst) {
  const int64_t first = from * PER_WORD<T>;
  copy_words<IN_PAIRS<T>>(row + first, dst, int(std::min<int64_t>(count * PER_WORD<T>, size - first)), vectors(count));
}

// Columns [column, column + width) of `rows` rows, at(i) each, as words that hold one column of PER_WORD rows, from word
// `from` on: dst (count × ldd), a multiple of W columns. Rows behind the last one are zeros.
template <typename T, typename At>
inline void pack_columns(At at, int64_t rows, int64_t from, int count, int64_t column, int width, float* dst, int ldd,
                         float* two_rows) {
  for (int i = 0; i < count; ++i, dst += ldd) {
    if constexpr (IN_PAIRS<T>) {
      const int words = int(round_up(width, 2 * W)) / 2;
      const auto words_at = [&](int64_t row, float* copy) -> const float* {
        if (row < rows && width % (2 * W) == 0) return reinterpret_cast<const float*>(at(row) + column);
        if (row < rows)
          copy_words<true>(at(row) + column, copy, width, words);
        else
          std::fill_n(copy, words, 0.0f);
        return copy;
      };
      const int64_t row = 2 * (from + i);
      const float* first = words_at(row, two_rows);
      mate_rows(first, words_at(row + 1, two_rows + words), dst, words);
    } else {
      load_row(at(from + i) + column, dst, width, vectors(width));
    }
  }
}

// Weights as they are stored, a matrix (rows × size) an expert. Another store of weights gives the same four things.
template <typename T>
class Stored {
 public:
  Stored(const Product& p, int64_t expert)
      : rows_(p.transposed ? p.depth : p.outputs),
        size_(p.transposed ? p.outputs : p.depth),
        data_(static_cast<const T*>(p.weight) + expert * rows_ * size_) {}

  // The element at which a row begins, for products that read it where it lies: steps of 2·W elements, with load_step.
  const T* row(int64_t i) const { return data_ + i * size_; }
  int64_t ld() const { return size_; }

  // Words [from, from + count) of rows [row, row + rows), where they lie if they are words there, else in `copy`.
  const float* words(int64_t row, int rows, int64_t from, int count, float* copy, int64_t& ld) const {
    if (sizeof(T) * PER_WORD<T> == sizeof(float) && size_ % PER_WORD<T> == 0) {
      ld = size_ / PER_WORD<T>;
      return reinterpret_cast<const float*>(this->row(row)) + from;
    }
    ld = spread(CHUNK);
    for (int i = 0; i < rows; ++i) pack_row(this->row(row + i), size_, from, count, copy + i * ld);
    return copy;
  }

  // As pack_columns.
  void columns(int64_t from, int count, int64_t column, int width, float* dst, int ldd, float* two_rows) const {
    pack_columns<T>([&](int64_t i) { return row(i); }, rows_, from, count, column, width, dst, ldd, two_rows);
  }

 private:
  const int64_t rows_, size_;
  const T* data_;
};

// --- a step of 2·W elements of a row: a vector of pairs, or two of numbers in the order of load_two ---

template <typename T>
constexpr int STEP_FLOATS = IN_PAIRS<T> ? W : 2 * W;

template <typename T>
inline void load_step(const T* p, vf& a, vf& b) {
  if constexpr (IN_PAIRS<T>)
    a = reinterpret_cast<vf>(*reinterpret_cast<const vh2_unaligned*>(p));
  else
    load_two(p, a, b);
}

// The last step of a row of `size` elements, zeros behind them.
template <typename T>
inline void load_last_step(const T* row, int64_t size, vf& a, vf& b) {
  alignas(64) T last[2 * W];
  const int64_t from = size / (2 * W) * (2 * W);
  std::memset(last, 0, sizeof last);
  std::memcpy(last, row + from, size_t(size - from) * sizeof(T));
  load_step(last, a, b);
}

template <typename T>
inline void pack_steps(const T* row, int64_t size, float* dst) {
  for (int64_t i = 0; i < size; i += 2 * W, dst += STEP_FLOATS<T>) {
    vf a, b{};
    if (i + 2 * W <= size)
      load_step(row + i, a, b);
    else
      load_last_step(row, size, a, b);
    store(dst, a);
    if (!IN_PAIRS<T>) store(dst + W, b);
  }
}

template <typename T>
inline vf multiply_add_step(vf acc, vf a, vf b, const float* x) {
  acc = multiply_add<IN_PAIRS<T>>(acc, a, load(x));
  return IN_PAIRS<T> ? acc : acc + b * load(x + W);
}

}  // namespace accel::ACCEL_ISA::moe
