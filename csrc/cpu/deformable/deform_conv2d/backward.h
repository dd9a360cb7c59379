// Backward: a task owns some channels of the input and goes through the outputs of all images in their order, so that
// every sum has one owner: the input's gradient in a map of the task's own, the weight's in its slice. What is summed
// over channels, the gradients of offsets and masks, is left in parts and added up in their order.
#pragma once

#include "tile.h"

namespace accel::ACCEL_ISA::deform {

// (O/g, K, width): a chunk's weight, its channels behind the taps; in pairs, words of two output channels.
template <typename T>
int64_t chunk_words(const BackwardParams& b) {
  return words<T>(b.p.out_group()) * b.p.taps() * b.width;
}

template <typename T>
void take_weight(const BackwardParams& b, const Chunk& chunk, float* dst) {
  const Params& p = b.p;
  const int64_t taps = p.taps(), line = taps * b.width, length = p.in_group() * taps;
  const int64_t group = chunk.first / p.in_group(), inside = chunk.first % p.in_group();
  Buffer rows(2 * line);
  for (int64_t o = 0; o < p.out_group(); ++o) {
    const T* src = static_cast<const T*>(p.weight) + (group * p.out_group() + o) * length + inside * taps;
    float* row = IN_PAIRS<T> ? rows + o % 2 * line : dst + o * line;
    std::fill_n(row, line, 0.0f);
    for (int64_t c = 0; c < chunk.count; ++c)
      for (int64_t k = 0; k < taps; ++k) row[k * b.width + c] = to_float(src[c * taps + k]);
    if constexpr (IN_PAIRS<T>) {
      if (o % 2 == 0 && o + 1 < p.out_group()) continue;
      for (int64_t i = 0; i < line; i += W)
        store_mated(dst + o / 2 * line + i, load(rows + i), o % 2 ? load(rows + line + i) : vf{});
    }
  }
}

template <typename T>
class Backward {
  static constexpr bool PAIRS = IN_PAIRS<T>;

 public:
  explicit Backward(const BackwardParams& b)
      : b(b),
        p(b.p),
        line(p.taps() * b.width),
        line_ld(spread(line)),
        out_ld(spread(round_up(p.out_group(), 16))),
        positions(p, POSITIONS),
        image(p.pixels() * b.width),
        grad_image(b.want_input ? p.pixels() * b.width : 0),
        outside(2 * b.width),
        grad_out(POSITIONS * out_ld),
        grad_words(PAIRS ? POSITIONS * out_ld : 0),
        columns(POSITIONS * line_ld),
        column_words(PAIRS ? POSITIONS / 2 * line_ld : 0),
        grad_columns(POSITIONS * line_ld),
        weight(b.want_input || b.spots ? chunk_words<T>(b) : 0) {}

  void run(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      if (b.want_input || b.spots) take_weight<T>(b, b.chunks[b.first_chunk + task], weight.data());
      for (int64_t i = 0; i < b.images; ++i) one(b.first_chunk + task, task, i);
    }
  }

 private:
  void one(int64_t n, int64_t part, int64_t index) {
    const Chunk& chunk = b.chunks[n];
    const int64_t now = b.first_image + index, pixels = p.pixels();
    take_pixels<T>(p.input, now, chunk.first, chunk.count, b.width, 0, pixels, image.data(), b.width);
    if (b.want_input) std::fill_n(grad_image.data(), pixels * b.width, 0.0f);
    std::fill_n(outside.data(), 2 * b.width, 0.0f);
    for (int64_t first = 0; first < p.outputs(); first += POSITIONS)
      tile(n, part, index, first, std::min<int64_t>(POSITIONS, p.outputs() - first));
    if (b.want_input) put_pixels<T>(b.grad_input, now, chunk.first, chunk.count, 0, pixels, grad_image, b.width);
  }

  void tile(int64_t n, int64_t part, int64_t index, int64_t first, int64_t count) {
    const Chunk& chunk = b.chunks[n];
    const int64_t now = b.first_image + index, group = chunk.first / p.in_group();
    const int64_t q = chunk.first / (p.channels / p.offset_groups), outs = p.out_group();
    positions.begin(first, count);
    for (int64_t tap = 0; tap < p.taps(); ++tap) positions.find(now, q, tap);
    take_pixels<T>(b.grad_out, now, group * outs, outs, round_up(outs, 16), first, first + count, grad_out.data(), out_ld);

    if (b.grad_weight) {
      const Pixels<float> pixels{image, b.width, outside};
      for (int64_t tap = 0; tap < p.taps(); ++tap)
        gather(pixels, positions.of(tap), count, 0, b.width, columns + tap * b.width, line_ld);
      float* to = b.grad_weight + n * outs * line;
      if constexpr (PAIRS) {
        mate(grad_out, out_ld, count, round_up(outs, 16), grad_words);
        mate(columns, line_ld, count, line, column_words);
        gemm<true>({grad_words, 1, out_ld, column_words, line_ld, to, line, to, line, int(count + 1) / 2}, int(outs),
                   int(line / W));
      } else {
        gemm({grad_out, 1, out_ld, columns, line_ld, to, line, to, line, int(count)}, int(outs), int(line / W));
      }
    }
    if (!b.want_input && !b.spots) return;
    if constexpr (PAIRS) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t o = 0; o < round_up(outs, 16); o += W)
          store(reinterpret_cast<bf16*>(grad_words + i * out_ld) + o, load(grad_out + i * out_ld + o));
      gemm<true>({grad_words, out_ld, 1, weight, line, grad_columns, line_ld, nullptr, 0, int(words<T>(outs))}, int(count),
                 int(line / W));
    } else {
      gemm({grad_out, out_ld, 1, weight, line, grad_columns, line_ld, nullptr, 0, int(outs)}, int(count), int(line / W));
    }
    for (int64_t tap = 0; tap < p.taps(); ++tap) {
      float* spots = b.spots ? b.spots + ((part * b.images + index) * 3 * p.taps() + tap) * p.outputs() + first : nullptr;
      spread_tap(positions.of(tap), count, grad_columns + tap * b.width, spots, p.taps() * p.outputs());
    }
  }

  // Mates rows 2i and 2i + 1 of fp32 numbers; an odd last one stands beside zeros.
  static void mate(const float* src, int64_t ld, int64_t rows, int64_t n, float* dst) {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < n; j += W)
        store_mated(dst + i / 2 * ld + j, load(src + i * ld + j), i + 1 < rows ? load(src + (i + 1) * ld + j) : vf{});
  }

  // From a tap's column gradients to the pixels they came from, and to the positions and masks of the samples:
  // spots[0], spots[step], spots[2 · step] of each output.
  void spread_tap(const TapCorners& c, int64_t count, const float* grad, float* spots, int64_t step) {
    constexpr int TOGETHER = W / 4;  // outputs, whose dot products of gradient and pixels fill a vector
    float dots[W];
    for (int64_t first = 0; first < count; first += TOGETHER) {
      const int some = int(std::min<int64_t>(TOGETHER, count - first));
      vf sums[W] = {};
      for (int i = 0; i < some; ++i)
        for (int n = 0; n < 4; ++n) sums[4 * i + n] = spread_corner(c, n, first + i, grad + (first + i) * line_ld);
      if (!spots) continue;
      store(dots, sums_of(sums));
      for (int i = 0; i < some; ++i) {
        const int64_t at = first + i;
        const float* s = dots + 4 * i;
        const float y = c.dy[at], x = c.dx[at], mask = c.mask[at];
        const bool moves = p.border_gradient || !at_border(c, at);
        spots[at] = moves ? mask * ((1.0f - x) * (s[2] - s[0]) + x * (s[3] - s[1])) : 0.0f;
        spots[step + at] = moves ? mask * ((1.0f - y) * (s[1] - s[0]) + y * (s[3] - s[2])) : 0.0f;
        float sample = s[0] * c.weight[0][at];
        for (int n = 1; n < 4; ++n) sample += s[n] * c.weight[n][at];
        spots[2 * step + at] = sample;
      }
    }
  }

  // At exactly −1 in y or x: on the first pixels inside, with nothing before them.
  static bool at_border(const TapCorners& c, int64_t i) {
    const bool above = c.at[0][i] >= 0 || c.at[1][i] >= 0, left = c.at[0][i] >= 0 || c.at[2][i] >= 0;
    return (c.dy[i] == 0.0f && !above) || (c.dx[i] == 0.0f && !left);
  }

  // The gradient's products with the pixel, a lane each, and its share added to the pixel's own.
  vf spread_corner(const TapCorners& c, int n, int64_t i, const float* grad) {
    const float* pixel = row_of(image.data(), b.width, c.at[n][i], outside.data());
    vf sum{};
    if (b.spots)
      for (int64_t d = 0; d < b.width; d += W) sum += load(grad + d) * load(pixel + d);
    if (b.want_input) {
      const vf weight = splat(c.weight[n][i] * c.mask[i]);
      float* dst = row_of(grad_image.data(), b.width, c.at[n][i], outside + b.width);
      for (int64_t d = 0; d < b.width; d += W) store(dst + d, load(dst + d) + load(grad + d) * weight);
    }
    return sum;
  }

  const BackwardParams& b;
  const Params& p;
  const int64_t line, line_ld, out_ld;
  Positions positions;
  Buffer image, grad_image;
  Buffer outside;  // the pixel of zeros that stands for all outside, and one that takes their gradient and is not read
  Buffer grad_out, grad_words, columns, column_words, grad_columns, weight;
};

// Tasks are (image of the round, offset group, tap); parts of `chunks` chunks are added to what earlier rounds left.
void sum_spots(const BackwardParams& b, int64_t chunks, int64_t from, int64_t to) {
  const Params& p = b.p;
  const int64_t taps = p.taps(), outputs = p.outputs(), shared = p.channels / p.offset_groups;
  for (int64_t task = from; task < to; ++task) {
    const int64_t image = task / (p.offset_groups * taps), q = task / taps % p.offset_groups, tap = task % taps;
    const int64_t now = (b.first_image + image) * p.offset_groups + q;
    for (int64_t part = 0; part < chunks; ++part) {
      const int64_t channel = b.chunks[b.first_chunk + part].first;
      if (channel / shared != q) continue;
      const bool starts = channel == q * shared;
      for (int kind = 0; kind < 3; ++kind) {
        float* dst = kind < 2 ? b.grad_offset : b.grad_mask;
        if (!dst) continue;
        dst += kind < 2 ? ((now * taps + tap) * 2 + kind) * outputs : (now * taps + tap) * outputs;
        const float* src = b.spots + (((part * b.images + image) * 3 + kind) * taps + tap) * outputs;
        for (int64_t i = 0; i < outputs; ++i) dst[i] = starts ? src[i] : dst[i] + src[i];
      }
    }
  }
}

template <typename T>
void unpack_grad_weight(const BackwardParams& b, int64_t from, int64_t to) {
  const Params& p = b.p;
  const int64_t taps = p.taps(), line = taps * b.width;
  for (int64_t n = from; n < to; ++n) {
    const Chunk& chunk = b.chunks[n];
    const int64_t group = chunk.first / p.in_group(), inside = chunk.first % p.in_group();
    for (int64_t o = 0; o < p.out_group(); ++o) {
      T* dst = static_cast<T*>(b.weight_result) + ((group * p.out_group() + o) * p.in_group() + inside) * taps;
      const float* src = b.grad_weight + (n * p.out_group() + o) * line;
      for (int64_t c = 0; c < chunk.count; ++c)
        for (int64_t k = 0; k < taps; ++k) from_float(src[k * b.width + c], dst + c * taps + k);
    }
  }
}

// Tasks are 16 output channels.
template <typename T>
void sum_bias(const BackwardParams& b, int64_t from, int64_t to) {
  constexpr int N = 16, RUN = 256;
  const Params& p = b.p;
  Buffer rows(RUN * N);
  for (int64_t task = from; task < to; ++task) {
    const int64_t first = task * N, count = std::min<int64_t>(N, p.out_channels - first);
    double sums[N] = {};
    for (int64_t image = 0; image < p.batch; ++image)
      for (int64_t at = 0; at < p.outputs(); at += RUN) {
        const int64_t end = std::min(at + RUN, p.outputs());
        take_pixels<T>(b.grad_out, image, first, count, N, at, end, rows.data(), N);
        float run[N] = {};
        for (int64_t i = 0; i < end - at; ++i)
          for (int o = 0; o < N; ++o) run[o] += rows[i * N + o];
        for (int o = 0; o < N; ++o) sums[o] += run[o];
      }
    for (int64_t o = 0; o < count; ++o) b.grad_bias[first + o] = float(sums[o]);
  }
}

}  // namespace accel::ACCEL_ISA::deform
