// Packing of the operands of a tile of logits, rows of queries and of keys.
//
// What is not finite is replaced by zero in the operands and remembered, since 0 · NaN would carry it to queries that
// may not see it; pairs that may see it are made NaN instead.
#pragma once

#include <vector>

#include "cpu/_pack.h"
#include "cpu/_pairs.h"

namespace accel::ACCEL_ISA::pairs {

using namespace accel::pairs;

// Rows of one operand, with a note of those that held something not finite.
template <bool PAIRS = false>
class Rows : public Words<PAIRS> {
 public:
  using Words<PAIRS>::at, Words<PAIRS>::padded;

  Rows(int64_t rows, int size) : Words<PAIRS>(rows, size), bad_(size_t(rows)) {}

  template <typename T>
  void pack(int64_t row, const T* src, float mul) {
    float* dst = at(row);
    vf check{};  // 0 · x is NaN for what is not finite
    int d = 0;
    for (; d + W <= size; d += W) {
      const vf x = load(src + d);
      check += x * 0.0f;
      store(dst + d, x * mul);
    }
    if (d < size) {
      load_row(src + d, dst + d, size - d, W);
      check += load(dst + d) * 0.0f;
      store(dst + d, load(dst + d) * mul);
    }
    if (!(sum_lanes(check)[0] == 0.0f)) {
      mark(row);
      for (int d = 0; d < padded; ++d)
        if (!std::isfinite(dst[d])) dst[d] = 0.0f;
    }
  }

  void pack_pairs(int64_t row, const bf16* src) {
    bf16* dst = reinterpret_cast<bf16*>(at(row));
    bool finite = true;
    int d = 0;
    for (; d + 2 * W <= size; d += 2 * W) {
      const vh2 x = *reinterpret_cast<const vh2_unaligned*>(src + d);
      *reinterpret_cast<vh2_unaligned*>(dst + d) = x;
      finite &= all_finite(x);
    }
    if (d < 2 * padded) {
      for (; d < size; ++d) {
        dst[d] = src[d];
        finite &= bool(std::isfinite(to_float(src[d])));
      }
      std::memset(dst + size, 0, size_t(2 * padded - size) * sizeof(bf16));
    }
    if (!finite) {
      mark(row);
      for (int d = 0; d < size; ++d)
        if (!std::isfinite(to_float(dst[d]))) dst[d] = bf16{0};
    }
  }

  void clear(int64_t row) {
    Words<PAIRS>::clear(row);
    bad_[size_t(row)] = false;
  }

  void forget() {
    if (any_bad_) std::fill(bad_.begin(), bad_.end(), 0);
    any_bad_ = false;
  }
  bool bad(int64_t row) const { return bad_[size_t(row)]; }
  bool any_bad() const { return any_bad_; }

 private:
  using Words<PAIRS>::size;

  void mark(int64_t row) {
    bad_[size_t(row)] = true;
    any_bad_ = true;
  }

  std::vector<char> bad_;
  bool any_bad_ = false;
};

template <typename T>
const T* row_of(const Strided& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<const T*>(x.data) + b * x.batch + h * x.head + t * x.token;
}

// One row of T; `mul` is for fp32 words alone.
template <typename T, bool PAIRS>
void pack_row(Rows<PAIRS>& rows, int64_t row, const T* src, float mul) {
  if constexpr (PAIRS) {
    rows.pack_pairs(row, src);
  } else {
    rows.pack(row, src, mul);
  }
}

// The keys of one block: rows [first, first + count), then zeros up to whole vectors.
template <typename T, bool PAIRS>
void pack_block(Rows<PAIRS>& rows, const Strided& x, int64_t b, int64_t h, int64_t first, int count) {
  rows.forget();
  for (int j = 0; j < count; ++j) {
    const T* src = row_of<T>(x, b, h, first + j);
    fetch(src + 16 * x.token, rows.words * 4);  // packing waits for memory, not for work
    pack_row<T>(rows, j, src, 1.0f);
  }
  for (int j = count; j < vectors(count); ++j) rows.clear(j);
}

}  // namespace accel::ACCEL_ISA::pairs
