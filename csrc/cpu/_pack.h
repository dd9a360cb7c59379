// Operands of products, packed as rows of 32-bit words: an fp32 number each or, where the processor multiplies those,
// a pair of bf16. Their stride is an odd number of cache lines, so that a column does not fall into a few sets of the
// cache.
#pragma once

#include "_gemm.h"
#include "_scratch.h"

namespace accel::ACCEL_ISA {

// Row stride for n floats: whole vectors, an odd number of cache lines.
inline int spread(int64_t n) { return int(16 * (round_up(n, 16) / 16 | 1)); }

inline int vectors(int n) { return int(round_up(n, W)); }

// Starts to bring memory into the cache, where it is to be read or written soon.
template <bool WRITE = false>
inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, WRITE);
}

// How far ahead one stream of memory is fetched, in bytes.
constexpr int64_t STREAM_AHEAD = 4096;

// Rows of memory that are wanted soon, fetched a few cache lines at a time: more requests at once than the processor can
// have under way would hold up those for what is wanted now. Into the second cache, as of rows that are a power of two
// apart the first one holds a few only.
class Ahead {
 public:
  // `rows` rows `stride` bytes apart, of which `bytes` each are wanted, in `calls` calls.
  Ahead(const void* from, int64_t stride, int64_t bytes, int rows, int calls)
      : row_(static_cast<const char*>(from)), at_(row_), end_(row_ + bytes), stride_(stride), rows_(rows),
        some_(int((rows * round_up(bytes, 64) / 64 + calls - 1) / std::max(calls, 1))) {}

  void operator()() {
    for (int i = 0; i < some_ && rows_ > 0; ++i) {
      __builtin_prefetch(at_, 0, 2);
      if ((at_ += 64) < end_) continue;
      at_ = row_ += stride_, end_ += stride_, --rows_;
    }
  }

 private:
  const char *row_, *at_, *end_;
  int64_t stride_;
  int rows_, some_;
};

// `padded` words, whole vectors, that hold `size` elements of T, zeros behind them. T is bf16 where there are PAIRS.
template <bool PAIRS, typename T>
inline void copy_words(const T* src, float* words, int size, int padded) {
  if constexpr (PAIRS) {
    bf16* dst = reinterpret_cast<bf16*>(words);
    int d = 0;
    for (; d + 2 * W <= size; d += 2 * W)
      *reinterpret_cast<vh2_unaligned*>(dst + d) = *reinterpret_cast<const vh2_unaligned*>(src + d);
    if (d == 2 * padded) return;
    std::memcpy(dst + d, src + d, size_t(size - d) * sizeof(bf16));
    std::memset(dst + size, 0, size_t(2 * padded - size) * sizeof(bf16));
  } else {
    load_row(src, words, size, padded);
  }
}

// Rows of one operand. In PAIRS a word holds two neighbours of a row and nothing is rounded, so that a factor has to
// wait for the product.
template <bool PAIRS = false>
class Words {
 public:
  Words(int64_t rows, int size) : Words(rows, size, spread(PAIRS ? (size + 1) / 2 : size)) {}
  Words(int64_t rows, int size, int ld)
      : words(PAIRS ? (size + 1) / 2 : size), padded(vectors(words)), ld(ld), size(size), data_(rows * ld) {}

  // Row `row` = that of T, zeros behind it up to `padded`. T is bf16 where there are PAIRS.
  template <typename T>
  void copy(int64_t row, const T* src) {
    copy_words<PAIRS>(src, at(row), size, padded);
  }

  void clear(int64_t row) { std::fill_n(at(row), padded, 0.0f); }

  float* at(int64_t row) const { return data_ + row * ld; }

  const int words, padded, ld;

 protected:
  const int size;

 private:
  Buffer data_;
};

// Rows in the form of a product's second operand, which is added up over them. As they lie in fp32; in pairs, a word
// holds the same column of two neighbouring rows.
template <bool PAIRS>
class Summed {
 public:
  Summed(int64_t rows, const Words<PAIRS>& like)
      : ld(PAIRS ? spread(2 * like.padded) : like.ld), data_(PAIRS ? (rows + 1) / 2 * ld : 0) {}

  // Rows [from, from + count) of `rows`. An odd last one is its own mate: the first operand has a zero there.
  void take(const Words<PAIRS>& rows, int64_t from, int count) {
    if constexpr (PAIRS) {
      for (int i = 0; i < count; i += 2)
        mate_rows(rows.at(from + i), rows.at(from + std::min(i + 1, count - 1)), data_ + i / 2 * ld, rows.padded);
    } else {
      source_ = rows.at(from);
    }
  }

  // From row `row`, even in pairs.
  const float* at(int64_t row) const { return PAIRS ? data_ + row / 2 * ld : source_ + row * ld; }

  const int ld;

 private:
  Buffer data_;
  const float* source_ = nullptr;
};

// A block of fp32 numbers as the first operand of a product: with a word for each, or rounded to pairs of bf16.
template <bool PAIRS>
class Weights {
 public:
  Weights(int64_t rows, int columns) : ld_(PAIRS ? spread((columns + 1) / 2) : 0), data_(rows * ld_) {}

  // Columns [from, to) of `rows` rows of x, to be added up over the columns; `from` is a multiple of W.
  void take(const float* x, int ld, int rows, int from, int to) {
    if constexpr (PAIRS) {
      begin(from);
      for (int i = 0; i < rows; ++i) fill_row(i, from, to, [&](int j) { return load(x + int64_t(i) * ld + j); });
    } else {
      at_ = x + from, row_ = ld;
    }
  }

  // The same of the rows that follow, row by row through fill_row; only in pairs.
  void begin(int from) { at_ = data_ + from / 2, row_ = ld_; }

  // f(j) makes the vector at column j. Where `to` is odd, its column holds a zero.
  template <typename F>
  void fill_row(int row, int from, int to, F f) {
    float* dst = data_ + int64_t(row) * ld_;
    int j = from;
    for (; j + W < to; j += 2 * W) {
      const vf first = f(j);
      store_halves(dst + j / 2, first, f(j + W));
    }
    if (j < to) store_halves(dst + j / 2, f(j), vf{});
  }

  // c = [init +] rows × (to − from) times as many of b.
  Gemm times(const Summed<PAIRS>& b, int from, int to, float* c, int ldc, const float* init) const {
    return {at_, row_, 1, b.at(from), b.ld, c, ldc, init, ldc, PAIRS ? (to - from + 1) / 2 : to - from};
  }

 private:
  const int ld_;
  Buffer data_;
  const float* at_ = nullptr;
  int row_ = 0;
};

// The same turned round, to be added up over its rows.
template <bool PAIRS>
class TurnedWeights {
 public:
  TurnedWeights(int64_t rows, int columns) : ld_(PAIRS ? spread(columns) : 0), data_((rows + 1) / 2 * ld_) {}

  void take(const float* x, int ld, int rows, int from, int to) {
    if constexpr (PAIRS) {
      begin(rows, from);
      for (int i = 0; i < rows; i += 2)
        for (int j = from; j < to; j += W) {
          const float* at = x + int64_t(i) * ld + j;
          put(i, j, load(at), i + 1 < rows ? load(at + ld) : vf{});
        }
    } else {
      at_ = x + from, col_ = ld, rows_ = rows;
    }
  }

  // The same of what follows, vector by vector through put; only in pairs.
  void begin(int rows, int from) { at_ = data_ + from, col_ = ld_, rows_ = rows; }

  // Vectors at column j of row `row`, which is even, and of the next one.
  void put(int row, int j, vf first, vf second) { store_mated(data_ + row / 2 * ld_ + j, first, second); }

  // c = [init +] (to − from) × rows times as many of b.
  Gemm times(const Summed<PAIRS>& b, float* c, int ldc, const float* init) const {
    return {at_, 1, col_, b.at(0), b.ld, c, ldc, init, ldc, PAIRS ? (rows_ + 1) / 2 : rows_};
  }

 private:
  const int ld_;
  Buffer data_;
  const float* at_ = nullptr;
  int col_ = 0, rows_ = 0;
};

}  // namespace accel::ACCEL_ISA
