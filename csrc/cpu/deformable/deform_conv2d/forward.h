// Forward: columns of a run of outputs are gathered a tap and DEPTH channels at a time, while they are in the cache, and
// multiplied by the weight at once.
#pragma once

#include "tile.h"

namespace accel::ACCEL_ISA::deform {

// Blocks of channels that enter a product together: of one weight group and one offset group.
template <typename F>
inline void for_each_block(const Params& p, int64_t group, F f) {
  const int64_t end = (group + 1) * p.in_group(), shared = p.channels / p.offset_groups;
  for (int64_t c = group * p.in_group(); c < end;) {
    const int64_t count = std::min({end - c, (c / shared + 1) * shared - c, int64_t(DEPTH)});
    f(c, count);
    c += count;
  }
}

// The packed weight of a group: for each panel, tap and block the rows of the block's channels (in pairs: of two), each
// PANEL output channels wide.
template <typename T>
int64_t panel_words(const Params& p) {
  int64_t rows = 0;
  for_each_block(p, 0, [&](int64_t, int64_t count) { rows += words<T>(count); });
  for (int64_t g = 1; g < p.groups; ++g) {
    int64_t other = 0;
    for_each_block(p, g, [&](int64_t, int64_t count) { other += words<T>(count); });
    rows = std::max(rows, other);
  }
  return rows * p.taps() * PANEL;
}

inline int64_t panels(const Params& p) { return (p.out_group() + PANEL - 1) / PANEL; }

template <typename T>
void pack_weight(const ForwardParams& f, int64_t from, int64_t to) {
  constexpr int N = 16;
  const Params& p = f.p;
  const int64_t length = p.in_group() * p.taps(), panel = panel_words<T>(p);
  Buffer turned(length * N);
  for (int64_t task = from; task < to; ++task) {  // a panel
    const int64_t group = task / panels(p), column = task % panels(p) * PANEL;
    for (int64_t o = 0; o < PANEL; o += N) {
      const int64_t rows = std::clamp<int64_t>(p.out_group() - column - o, 0, N);
      const T* src = static_cast<const T*>(p.weight) + (group * p.out_group() + column + o) * length;
      turn_rows(src, length, rows, length, turned.data());
      float* dst = f.weight + task * panel + o;
      for (int64_t tap = 0; tap < p.taps(); ++tap)
        for_each_block(p, group, [&](int64_t first, int64_t count) {
          const float* line = turned + ((first - group * p.in_group()) * p.taps() + tap) * N;
          const int64_t step = p.taps() * N;
          for (int64_t c = 0; c < count; c += IN_PAIRS<T> ? 2 : 1, dst += PANEL)
            for (int v = 0; v < N; v += W) {
              if constexpr (IN_PAIRS<T>) {
                store_mated(dst + v, load(line + c * step + v), c + 1 < count ? load(line + (c + 1) * step + v) : vf{});
              } else {
                store(dst + v, load(line + c * step + v));
              }
            }
        });
    }
  }
}

template <typename T>
void pack_image(const ForwardParams& f, int64_t from, int64_t to) {
  const Params& p = f.p;
  const int64_t pixels = p.pixels(), runs = (pixels + PIXELS_OF_TASK - 1) / PIXELS_OF_TASK;
  for (int64_t task = from; task < to; ++task) {
    const int64_t image = task / runs, first = task % runs * PIXELS_OF_TASK;
    const int64_t end = std::min(first + PIXELS_OF_TASK, pixels);
    T* dst = static_cast<T*>(f.image) + image * image_size(f);
    take_pixels<T>(p.input, f.first_image + image, 0, p.channels, f.row, first, end, dst + first * f.row, f.row);
    if (end == pixels) std::memset(dst + pixels * f.row, 0, LEAST_CHUNK * sizeof(T));
  }
}

template <typename T>
class Forward {
  using Column = std::conditional_t<IN_PAIRS<T>, bf16, float>;
  static constexpr int64_t PER_WORD = IN_PAIRS<T> ? 2 : 1;

 public:
  explicit Forward(const ForwardParams& f)
      : f(f),
        p(f.p),
        group_ld(round_up(p.out_group(), PANEL)),
        out_ld(spread(p.groups * group_ld)),
        column_ld(spread(DEPTH / PER_WORD)),
        positions(p, f.tile),
        columns(f.tile * column_ld),
        out(f.tile * out_ld),
        bias(p.groups * group_ld),
        zeros(f.row + LEAST_CHUNK) {
    std::fill_n(zeros.data(), f.row + LEAST_CHUNK, 0.0f);
    for (int64_t g = 0; g < p.groups; ++g)
      for (int64_t o = 0; o < group_ld; ++o)
        bias[g * group_ld + o] = p.bias && o < p.out_group() ? p.bias[g * p.out_group() + o] : 0.0f;
  }

  void run(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t image = task / f.tiles, turn = task % f.tiles;
      const int64_t first = p.outputs() * turn / f.tiles, end = p.outputs() * (turn + 1) / f.tiles;
      tile(image, first, end - first);
    }
  }

 private:
  void tile(int64_t image, int64_t first, int64_t count) {
    positions.begin(first, count);
    Pixels<T> pixels{};
    if (f.packed) {
      pixels.data = static_cast<const T*>(f.image) + image * image_size(f);
    } else {
      pixels.data = static_cast<const T*>(p.input.data) + (f.first_image + image) * p.input.image;
    }
    pixels.row = f.packed ? f.row : p.input.pixel;
    pixels.zeros = reinterpret_cast<const T*>(zeros.data());
    const int64_t panel = panel_words<T>(p), shared = p.channels / p.offset_groups;
    const int64_t group_panels = panels(p);
    for (int64_t g = 0; g < p.groups; ++g) {
      int64_t offset = 0, found = -1;
      const float* weight = f.weight + g * group_panels * panel;
      for (int64_t tap = 0; tap < p.taps(); ++tap)
        for_each_block(p, g, [&](int64_t channel, int64_t channels) {
          const int64_t q = channel / shared;
          if (q * p.taps() + tap != found) positions.find(f.first_image + image, q, tap), found = q * p.taps() + tap;
          Column* dst = reinterpret_cast<Column*>(columns.data());
          gather(pixels, positions.of(tap), count, channel, channels, dst, column_ld * PER_WORD);
          const int64_t depth = words<T>(channels);
          if (IN_PAIRS<T> && channels % 2)
            for (int64_t i = 0; i < count; ++i) from_float(0.0f, dst + i * column_ld * PER_WORD + channels);
          for (int64_t v = 0; v < group_panels; ++v) {
            float* to = out + g * group_ld + v * PANEL;
            const bool starts = offset == 0;
            const int vectors = int(std::min<int64_t>(PANEL, round_up(p.out_group() - v * PANEL, W)) / W);
            gemm<IN_PAIRS<T>>({columns, column_ld, 1, weight + v * panel + offset, PANEL, to, out_ld,
                               starts ? bias + g * group_ld + v * PANEL : to, starts ? 0 : out_ld, int(depth)},
                              int(count), vectors);
          }
          offset += depth * PANEL;
        });
      put_pixels<T>(p.out, f.first_image + image, g * p.out_group(), p.out_group(), first, count, out + g * group_ld,
                    out_ld);
    }
  }

  const ForwardParams& f;
  const Params& p;
  const int64_t group_ld, out_ld, column_ld;
  Positions positions;
  Buffer columns, out, bias, zeros;
};

}  // namespace accel::ACCEL_ISA::deform
