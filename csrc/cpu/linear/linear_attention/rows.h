// Rows of a chunk, packed in fp32 and, where products are made of pairs of bf16, rounded to those.
//
// In causal order all sums are made of the rounded numbers, also those in fp32: a gradient is the difference of what
// comes by way of the output and by way of its denominator, and where both are large it would be that of two roundings.
//
// What is not finite is replaced by zero in the operands and remembered, since 0 · NaN would carry it to queries that
// may not see it; the rows that see it are made NaN when they are stored.
#pragma once

#include "maps.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/_pack.h"

namespace accel::ACCEL_ISA::linear {

using namespace accel::linear_attention;

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

template <typename T>
T* row_of(const Strided& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(x.data) + b * x.batch + h / x.share * x.head + t * x.token;
}

// Only what reads and writes rows is made for each dtype; in between all is fp32, or pairs of bf16, which no other
// dtype comes to.
template <bool PAIRS, typename F>
inline void with_type(Dtype dtype, F f) {
  if constexpr (PAIRS) return f(bf16{});
  if (dtype == Dtype::f32) f(float{});
  if (dtype == Dtype::bf16) f(bf16{});
  if (dtype == Dtype::f16) f(fp16{});
}

// Rows of a chunk, with a note of those that held something not finite.
template <bool PAIRS>
class Rows : public Words<> {
 public:
  explicit Rows(int size)
      : Words<>(CHUNK, size), rounded_(PAIRS ? CHUNK : 0, size), mated_(PAIRS ? CHUNK : 0, rounded_) {}

  // Row i of the first `count` = mul(i) · map(source(i)), zeros behind it and in rows without a source.
  template <typename M, typename Source, typename Factor>
  void pack(M, int count, Source source, Factor mul) {
    std::fill_n(bad_, CHUNK, false);
    vf check{};  // of all rows at once: hardly ever is there anything to look for
    for (int i = 0; i < vectors(count); ++i) {
      const auto* src = i < count ? source(i) : nullptr;
      if (src) {
        check += pack_row(M{}, i, src, mul(i));
      } else {
        clear(i);
      }
    }
    if (sum_lanes(check)[0] == 0.0f) return;
    for (int i = 0; i < count; ++i)
      if (const auto* src = source(i))
        if (!(sum_lanes(pack_row(M{}, i, src, mul(i)))[0] == 0.0f)) spoil(i);
  }

  // What is not finite in a row counts as zero from now on.
  void spoil(int row) {
    bad_[row] = true;
    for (int d = 0; d < padded; ++d)
      if (!std::isfinite(at(row)[d])) at(row)[d] = 0.0f;
  }

  bool bad(int row) const { return bad_[row]; }
  int first_bad() const { return int(std::find(bad_, bad_ + CHUNK, true) - bad_); }

  // To be called when rows [0, count) are complete, with zeros behind them up to a whole vector of rows. `in_fp32`: the
  // fp32 rows take the rounded numbers too.
  void round(int count, bool in_fp32) {
    if constexpr (!PAIRS) return;
    for (int i = 0; i < vectors(count); ++i)
      for (int d = 0; d < padded; d += 2 * W) {
        float* row = at(i) + d;
        const bool more = d + W < padded;
        store_halves(rounded_.at(i) + d / 2, load(row), more ? load(row + W) : vf{});
        if (!in_fp32) continue;
        const bf16* made = reinterpret_cast<const bf16*>(rounded_.at(i)) + d;
        store(row, load(made));
        if (more) store(row + W, load(made + W));
      }
    is_mated_ = false;
  }

  // An operand that is added up over its columns.
  const Words<PAIRS>& words() const {
    if constexpr (PAIRS)
      return rounded_;
    else
      return *this;
  }

  // One that is added up over its first `count` rows.
  const Summed<PAIRS>& summed(int count) {
    if (!PAIRS || !is_mated_) mated_.take(words(), 0, int(round_up(count, 2)));
    is_mated_ = true;
    return mated_;
  }

  // to = words() turned round: a row of keys, or of what else the rows are, to each word.
  void turn(float* to, int to_ld, int count) const {
    transpose(words().at(0), words().ld, to, to_ld, vectors(count), words().padded);
  }

  using Words<>::size;

 private:
  // The sum over the row of 0 · x: NaN where something is not finite.
  template <typename M, typename T>
  vf pack_row(M, int row, const T* src, float mul) {
    float* dst = at(row);
    vf check{};
    int d = 0;
    for (; d + W <= size; d += W) {
      const vf x = M::value(load(src + d));
      check += x * 0.0f;
      store(dst + d, x * mul);
    }
    if (d < size) {
      float tail[W];
      load_row(src + d, tail, size - d, W);
      store(tail, M::value(load(tail)));
      for (int i = 0; i < W; ++i) dst[d + i] = d + i < size ? tail[i] * mul : 0.0f;
      check += load(dst + d) * 0.0f;
      d += W;
    }
    for (; d < padded; d += W) store(dst + d, vf{});
    return check;
  }

  Words<PAIRS> rounded_;
  Summed<PAIRS> mated_;
  bool is_mated_ = false;
  bool bad_[CHUNK] = {};
};

}  // namespace accel::ACCEL_ISA::linear
