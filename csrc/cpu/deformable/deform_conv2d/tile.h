// A run of outputs and what its taps sample: positions, the pixels around them, columns. Shared by forward and backward.
#pragma once

#include "params.h"

#include <algorithm>

#include "cpu/_pack.h"
#include "cpu/_sampling.h"

namespace accel::ACCEL_ISA::deform {

// The corners of every output's sample of one tap, as corners_of has them, and its mask.
struct TapCorners {
  int32_t* at[4];
  float* weight[4];
  float *dy, *dx, *mask;
};

// Outputs [first, first + count) of an image. Arrays are as long as the most of them, in whole vectors.
class Positions {
 public:
  Positions(const Params& p, int64_t most)
      : p_(p), most_(round_up(most, 16)), base_(2 * most_), corners_(p.taps() * 11 * most_) {}

  void begin(int64_t first, int64_t count) {
    first_ = first, count_ = count;
    for (int64_t i = 0; i < round_up(count, W); ++i) {
      const int64_t at = std::min(first + i, p_.outputs() - 1);
      base_[i] = float(at / p_.out_w * p_.stride[0] - p_.padding[0]);
      base_[most_ + i] = float(at % p_.out_w * p_.stride[1] - p_.padding[1]);
    }
  }

  int64_t count() const { return count_; }

  // The corners of a tap, as `find` left them.
  TapCorners of(int64_t tap) const {
    float* at = corners_ + tap * 11 * most_;
    TapCorners c;
    for (int i = 0; i < 4; ++i) {
      c.at[i] = reinterpret_cast<int32_t*>(at + i * most_);
      c.weight[i] = at + (4 + i) * most_;
    }
    c.dy = at + 8 * most_, c.dx = at + 9 * most_, c.mask = at + 10 * most_;
    return c;
  }

  void find(int64_t image, int64_t group, int64_t tap) {
    const int64_t outputs = p_.outputs(), taps = p_.taps();
    const float* shift = p_.offset + ((image * p_.offset_groups + group) * 2 * taps + 2 * tap) * outputs + first_;
    const float* mask = p_.mask ? p_.mask + ((image * p_.offset_groups + group) * taps + tap) * outputs + first_ : nullptr;
    const TapCorners c = of(tap);
    int64_t i = 0;
    for (; i + W <= count_; i += W)
      find(c, i, tap, load(shift + i), load(shift + outputs + i), mask ? load(mask + i) : splat(1.0f));
    if (i == count_) return;
    float rest[3][W] = {};
    for (int64_t j = 0; i + j < count_; ++j) {
      rest[0][j] = shift[i + j], rest[1][j] = shift[outputs + i + j];
      rest[2][j] = mask ? mask[i + j] : 1.0f;
    }
    find(c, i, tap, load(rest[0]), load(rest[1]), load(rest[2]));
  }

 private:
  void find(const TapCorners& to, int64_t i, int64_t tap, vf shift_y, vf shift_x, vf mask) {
    const vf y = load(base_ + i) + float(tap / p_.kernel[1] * p_.dilation[0]) + shift_y;
    const vf x = load(base_ + most_ + i) + float(tap % p_.kernel[1] * p_.dilation[1]) + shift_x;
    const vi height = splat_int(int32_t(p_.height)), width = splat_int(int32_t(p_.width));
    const Corners c = corners_of(y, x, height, width, {vu{}, reinterpret_cast<vu>(width), vu{} + 1, splat_int(OUTSIDE)});
    for (int n = 0; n < 4; ++n) {
      store(to.at[n] + i, c.at[n]);
      store(to.weight[n] + i, c.weight[n]);
    }
    store(to.dy + i, c.dy);
    store(to.dx + i, c.dx);
    store(to.mask + i, mask);
  }

  const Params& p_;
  const int64_t most_;
  Buffer base_, corners_;
  int64_t first_ = 0, count_ = 0;
};

// Pixels with their channels side by side, `row` elements from one to the next.
template <typename T>
struct Pixels {
  const T* data;
  int64_t row;
  const T* zeros;  // stands for every pixel outside
};

// dst[i · ld ...] = samples of `count` channels, times the mask, in whole vectors.
template <typename T, typename To>
inline void gather(const Pixels<T>& pixels, const TapCorners& c, int64_t outputs, int64_t first, int64_t count, To* dst,
                   int64_t ld) {
  for (int64_t i = 0; i < outputs; ++i) {
    const T* from[4];
    vf weight[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) from[n] = row_of(pixels.data, pixels.row, c.at[n][i], pixels.zeros) + first, weight[n] = splat(c.weight[n][i]);
    const vf mask = splat(c.mask[i]);
    int64_t d = 0;
    if constexpr (std::is_same_v<To, T>) {
      for (; d + 2 * W <= count; d += 2 * W) {
        vf sum[2] = {};
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          vf x[2];
          load_two(from[n] + d, x[0], x[1]);
          sum[0] += x[0] * weight[n], sum[1] += x[1] * weight[n];
        }
        store_two(dst + i * ld + d, sum[0] * mask, sum[1] * mask);
      }
    }
    for (; d < count; d += W) {
      vf sample = load(from[0] + d) * weight[0];
#pragma GCC unroll 4
      for (int n = 1; n < 4; ++n) sample += load(from[n] + d) * weight[n];
      store(dst + i * ld + d, sample * mask);
    }
  }
}

// Words of a product's first operand for n values of T.
template <typename T>
constexpr int64_t words(int64_t n) {
  return IN_PAIRS<T> ? (n + 1) / 2 : n;
}

// 16 rows of `length` elements at `step`, of which `rows` are real, to fp32 columns: dst[i · 16 + row].
template <typename T>
inline void turn_rows(const T* src, int64_t step, int64_t rows, int64_t length, float* dst) {
  constexpr int N = 16;
  float block[N * N];
  for (int64_t i = 0; i < length; i += N) {
    const int n = int(std::min<int64_t>(N, length - i));
    for (int r = 0; r < N; ++r) {
      if (r < rows) {
        load_row(src + r * step + i, block + r * N, n, N);
      } else {
        std::fill_n(block + r * N, N, 0.0f);
      }
    }
    if (n == N) {
      transpose(block, N, dst + i * N, N, N, N);
    } else {
      for (int k = 0; k < n; ++k)
        for (int r = 0; r < N; ++r) dst[(i + k) * N + r] = block[r * N + k];
    }
  }
}

// Channels [first, first + count) of pixels [from, to) of a map, side by side in rows of `ld` elements, whose rest up to
// `padded` becomes zero.
template <typename T, typename To>
inline void take_pixels(const Map& map, int64_t image, int64_t first, int64_t count, int64_t padded, int64_t from,
                        int64_t to, To* dst, int64_t ld) {
  const T* src = static_cast<const T*>(map.data) + image * map.image + first * map.channel;
  if (map.channel == 1) {
    for (int64_t i = from; i < to; ++i) {
      const T* pixel = src + i * map.pixel;
      To* row = dst + (i - from) * ld;
      int64_t c = 0;
      for (; c + W <= count; c += W) store(row + c, load(pixel + c));
      for (; c < count; ++c) from_float(to_float(pixel[c]), row + c);
      for (; c < padded; ++c) from_float(0.0f, row + c);
    }
    return;
  }
  constexpr int N = 16, RUN = 256;
  float turned[N * RUN];
  for (int64_t i = from; i < to; i += RUN) {
    const int64_t run = std::min<int64_t>(RUN, to - i);
    for (int64_t c = 0; c < padded; c += N) {
      turn_rows(src + c * map.channel + i * map.pixel, map.channel, std::clamp<int64_t>(count - c, 0, N), run, turned);
      for (int64_t k = 0; k < run; ++k)
        for (int v = 0; v < N; v += W) store(dst + (i - from + k) * ld + c + v, load(turned + k * N + v));
    }
  }
}

// Channels [first, first + count) of `pixels` pixels from `pixel` on = fp32 rows at `ld`.
template <typename T>
inline void put_pixels(const Map& map, int64_t image, int64_t first, int64_t count, int64_t pixel, int64_t pixels,
                       const float* src, int64_t ld) {
  T* dst = static_cast<T*>(map.data) + image * map.image + first * map.channel + pixel * map.pixel;
  if (map.channel == 1) {
    for (int64_t i = 0; i < pixels; ++i) store_row(dst + i * map.pixel, src + i * ld, int(count), 1.0f);
    return;
  }
  constexpr int N = 16;
  float block[N * N], turned[N * N];
  for (int64_t i = 0; i < pixels; i += N)
    for (int64_t c = 0; c < count; c += N) {
      const int n = int(std::min<int64_t>(N, pixels - i)), m = int(std::min<int64_t>(N, count - c));
      for (int k = 0; k < N; ++k) {
        if (k < n) {
          load_row(src + (i + k) * ld + c, block + k * N, m, N);
        } else {
          std::fill_n(block + k * N, N, 0.0f);
        }
      }
      transpose(block, N, turned, N, N, N);
      for (int k = 0; k < m; ++k) store_row(dst + (c + k) * map.channel + i, turned + k * N, n, 1.0f);
    }
}

}  // namespace accel::ACCEL_ISA::deform
