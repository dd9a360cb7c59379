// Quantisation to eight bits by blocks: the largest value of each, its scale, and codes, as they lie or turned. Nothing is
// flushed: a subnormal number beside the least block that counts has a code.

#include "params.h"

#include <cstring>

#include "cpu/_fp8.h"
#include "cpu/_pack.h"

namespace accel::ACCEL_ISA::fp8 {
namespace {

constexpr int64_t SPAN = 1 << 14;  // elements that are measured, then encoded, while they are in a cache
constexpr int64_t WIDE = 32;       // columns of a block from which on it is measured as a whole

// The largest finite absolute value is the largest of its bits. What is not finite becomes negative, as counts from the
// exponent of 1 on; the least is 0.
inline vi size_of(vf x) {
  return reinterpret_cast<vi>((reinterpret_cast<vu>(x) & MAGNITUDE) + (1u << 23));
}
constexpr int32_t NO_SIZE = 1 << 23;

// The same of pairs of bf16, in the upper half of a word each.
inline vs2 sizes_of(vh2 x) { return reinterpret_cast<vs2>((x & uint16_t(0x7fff)) + uint16_t(0x80)); }

inline vf number_of(vi size) { return reinterpret_cast<vf>(size - NO_SIZE); }

// f(n), where 128, as most blocks have columns, is a constant that loops are unrolled by.
template <typename G>
inline void with_size(int64_t n, G f) {
  if (n == 128) return f(std::integral_constant<int64_t, 128>{});
  f(n);
}

// Part of a matrix: rows, and columns of whole blocks.
struct Part {
  int64_t matrix, row, rows, column, columns;
};

template <typename T, typename F>
class Quantizer {
 public:
  explicit Quantizer(const Params& p)
      : p(p),
        x(static_cast<const T*>(p.x)),
        span(std::max<int64_t>({1, SPAN / (p.piece() * p.cols), 4 * W / p.cols})),
        ahead(p.rows == 1 ? p.width : p.cols),
        largest(round_up(std::min(span, p.across()), W)),
        factors(round_up(std::min(span, p.across()), W)),
        scales(round_up(std::min(span, p.across()), W)),
        columns(round_up(std::min(span * p.cols, p.width), W)) {}

  // Bands of one piece.
  void quantize(int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t band = i % p.bands(), row = band * p.rows;
      for (int64_t block = 0; block < p.across(); block += span) {
        const int64_t blocks = std::min(span, p.across() - block);
        const Part part = part_of(i / p.bands(), row, std::min(p.rows, p.height - row), block, blocks);
        measure(part, largest);
        settle(largest, blocks);
        store_scales(part.matrix, band, block, blocks);
        encode(part, factors);
      }
    }
  }

  void measure_pieces(float* to, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) each_span(i, [&](const Part& part, int64_t, int64_t block) {
      measure(part, to + i * p.across() + block);
    });
  }

  void settle_all(const float* found, float* to) {
    float* const most = largest;
    for (int64_t band = 0; band < p.batch * p.bands(); ++band, found += p.pieces() * p.across(), to += p.across())
      for (int64_t block = 0; block < p.across(); block += span) {
        const int64_t blocks = std::min(span, p.across() - block);
        std::fill_n(most, blocks, 0.0f);
        for (int64_t piece = 0; piece < p.pieces(); ++piece)
          for (int64_t i = 0; i < blocks; ++i) most[i] = std::max(most[i], found[piece * p.across() + block + i]);
        settle(most, blocks);
        store_scales(band / p.bands(), band % p.bands(), block, blocks);
        std::copy_n(factors.data(), blocks, to + block);
      }
  }

  void encode_pieces(const float* from, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) each_span(i, [&](const Part& part, int64_t band, int64_t block) {
      encode(part, from + band * p.across() + block);
    });
  }

 private:
  Part part_of(int64_t matrix, int64_t row, int64_t rows, int64_t block, int64_t blocks) const {
    const int64_t column = block * p.cols;
    return {matrix, row, rows, column, std::min(blocks * p.cols, p.width - column)};
  }

  // f(part, band, first block) for the spans of piece i of all.
  template <typename G>
  void each_span(int64_t i, G f) const {
    const int64_t band = i / p.pieces(), begin = (band % p.bands()) * p.rows;
    const int64_t row = begin + i % p.pieces() * p.piece(), end = std::min(begin + p.rows, p.height);
    const int64_t rows = std::min(p.piece(), end - row);  // none where a short band has fewer pieces
    for (int64_t block = 0; block < p.across(); block += span)
      f(part_of(band / p.bands(), row, rows, block, std::min(span, p.across() - block)), band, block);
  }

  const T* row_at(const Part& part, int64_t row) const {
    return x + ((part.matrix * p.height + part.row + row) * p.width + part.column);
  }

  // --- largest values ---

  void measure(const Part& part, float* found) {
    if (p.cols >= WIDE) {
      for (int64_t c = 0; c < part.columns; c += p.cols)
        with_size(std::min(p.cols, part.columns - c), [&](auto n) { *found++ = measure_block(part, c, n); });
      return;
    }
    for (int64_t c = 0; c < part.columns; c += W) {
      vi most = vi{} + NO_SIZE;
      for (int64_t r = 0; r < part.rows; ++r) most = max(most, size_of(load_some(row_at(part, r) + c, part.columns - c)));
      store(columns + c, number_of(most));
    }
    for (int64_t c = 0; c < part.columns; c += p.cols) {
      const int64_t end = std::min(c + p.cols, part.columns);
      *found++ = *std::max_element(columns + c, columns + end);
    }
  }

  template <typename N>
  float measure_block(const Part& part, int64_t column, N n) const {
    vi most = vi{} + NO_SIZE, too = most;
    vs2 pairs{};
    for (int64_t r = 0; r < part.rows; ++r) {
      const T* const row = row_at(part, r) + column;
      fetch(row + ahead, n * int64_t(sizeof(T)));
      int64_t c = 0;
      if constexpr (std::is_same_v<T, bf16>) {
        for (; c + 2 * W <= n; c += 2 * W)
          pairs = max(pairs, sizes_of(*reinterpret_cast<const vh2_unaligned*>(row + c)));
      } else {
        for (; c + 2 * W <= n; c += 2 * W) most = max(most, size_of(load(row + c))), too = max(too, size_of(load(row + c + W)));
      }
      for (; c < n; c += W) most = max(most, size_of(load_some(row + c, n - c)));
    }
    const vu words = reinterpret_cast<vu>(pairs);
    most = max(most, max(reinterpret_cast<vi>(words << 16), reinterpret_cast<vi>(words & 0xffff0000u)));
    return max_lanes(number_of(max(most, too)))[0];
  }

  // --- scales, and the factors that numbers are multiplied with ---

  void settle(const float* found, int64_t blocks) {
    for (int64_t i = 0; i < blocks; i += W) {
      vf scale, factor;
      scale_of(load_some(found + i, blocks - i), scale, factor);
      store(scales + i, scale), store(factors + i, factor);
    }
  }

  void scale_of(vf amax, vf& scale, vf& factor) const {
    constexpr bool E4M3 = std::is_same_v<F, e4m3>;
    constexpr uint32_t LEAST = (E4M3 ? 10u : 17u) << 23, EXPONENT = E4M3 ? 8 : 15;  // 2⁻¹¹⁷ and 2⁻¹¹⁰, 448 and 57344
    const Lanes none = below(reinterpret_cast<vi>(amax), vi{} + int(LEAST));
    const vf one = splat(1.0f);
    if (p.scale_format == ScaleFormat::fp32) {
      const vf most = splat(E4M3 ? 448.0f : 57344.0f), some = where(none, most, amax);
      scale = some / most, factor = most / some;
    } else {
      const vu bits = reinterpret_cast<vu>(where(none, one, amax));
      const vu more = where(below(reinterpret_cast<vi>(bits & 0x7fffffu), vi{} + 0x600001), vu{}, vu{} + 1u);
      const vu power = (bits >> 23) - EXPONENT + more;
      scale = reinterpret_cast<vf>(power << 23), factor = reinterpret_cast<vf>((254u - power) << 23);
    }
    scale = where(none, one, scale), factor = where(none, one, factor);
  }

  void store_scales(int64_t matrix, int64_t band, int64_t block, int64_t blocks) const {
    const int64_t next = p.turned ? p.bands() : 1;
    int64_t at = matrix * p.bands() * p.across() + (p.turned ? block * p.bands() + band : band * p.across() + block);
    for (int64_t i = 0; i < blocks; ++i, at += next) {
      uint32_t bits;
      std::memcpy(&bits, scales + i, sizeof bits);
      if (p.scale_format == ScaleFormat::e8m0)
        static_cast<uint8_t*>(p.scales)[at] = uint8_t(bits >> 23);
      else
        static_cast<float*>(p.scales)[at] = scales[i];
    }
  }

  // --- codes ---

  void encode(const Part& part, const float* by) {
    const bool spread = p.turned || p.cols < WIDE;
    if (spread)
      for (int64_t c = 0, i = 0; c < part.columns; c += p.cols, ++i)
        std::fill_n(columns + c, std::min(p.cols, part.columns - c), by[i]);
    if (p.turned) return encode_turned(part);
    for (int64_t r = 0; r < part.rows; ++r) {
      const T* const row = row_at(part, r);
      uint8_t* const to = p.codes + (row - x);
      if (spread)
        encode_row(row, part.columns, [&](int64_t c) { return load(columns + c); }, to);
      else
        for (int64_t c = 0, i = 0; c < part.columns; c += p.cols, ++i) {
          const vf factor = splat(by[i]);
          with_size(std::min(p.cols, part.columns - c), [&](auto n) { encode_block(row + c, n, factor, to + c); });
        }
    }
  }

  template <typename N>
  void encode_block(const T* row, N n, vf factor, uint8_t* to) const {
    int64_t c = 0;
    for (; c + 2 * W <= n; c += 2 * W) {
      vf a, b;
      load_two(row + c, a, b);
      store_two_bytes<T>(to + c, codes_of<F>(a * factor), codes_of<F>(b * factor));
    }
    encode_row(row + c, n - c, [&](int64_t) { return factor; }, to + c);
  }

  template <typename G>
  void encode_row(const T* row, int64_t n, G factor, uint8_t* to) const {
    int64_t c = 0;
    for (; c + W <= n; c += W) store_bytes(to + c, codes_of<F>(load(row + c) * factor(c)));
    if (c == n) return;
    alignas(64) uint8_t some[W];
    store_bytes(some, codes_of<F>(load_some(row + c, n - c) * factor(c)));
    std::memcpy(to + c, some, size_t(n - c));
  }

  // Words of four codes of a column are turned by the vector: W columns of 4·W rows at a time.
  void encode_turned(const Part& part) {
    uint8_t* const to = p.codes + (part.matrix * p.width + part.column) * p.height + part.row;
    for (int64_t r = 0; r < part.rows; r += 4 * W)
      for (int64_t c = 0; c < part.columns; c += W)
        encode_turned(part, r, c, std::min<int64_t>(4 * W, part.rows - r), std::min<int64_t>(W, part.columns - c),
                      to + c * p.height + r);
  }

  void encode_turned(const Part& part, int64_t row, int64_t column, int64_t rows, int64_t cols, uint8_t* to) const {
    const vf factor = load(columns + column);
    vf words[W];
    for (int i = 0; i < W; ++i) {
      vu word{};
      for (int k = 0; k < 4 && 4 * i + k < rows; ++k) {
        const vf value = load_some(row_at(part, row + 4 * i + k) + column, cols);
        word |= codes_of<F>(value * factor) << (8 * k);
      }
      words[i] = reinterpret_cast<vf>(word);
    }
    transpose_block(words);
    for (int64_t c = 0; c < cols; ++c) std::memcpy(to + c * p.height, &words[c], size_t(rows));
  }

  const Params& p;
  const T* const x;
  const int64_t span;   // blocks of one
  const int64_t ahead;  // elements to what is measured next: a row of one is too short for the processor to foresee it
  Buffer largest, factors, scales;  // of blocks
  Buffer columns;                   // largest values, then factors, of columns
};

template <typename G>
void with_types(const Params& p, G f) {
  const auto with_format = [&](auto x) {
    using T = decltype(x);
    if (p.format == Format::e4m3) return f(Quantizer<T, e4m3>(p));
    f(Quantizer<T, e5m2>(p));
  };
  if (p.dtype == Dtype::f32) with_format(float{});
  if (p.dtype == Dtype::bf16) with_format(bf16{});
  if (p.dtype == Dtype::f16) with_format(fp16{});
}

}  // namespace

void quantize(const Params& p, int64_t from, int64_t to) {
  with_types(p, [&](auto&& quantizer) { quantizer.quantize(from, to); });
}

void measure(const Params& p, float* largest, int64_t from, int64_t to) {
  with_types(p, [&](auto&& quantizer) { quantizer.measure_pieces(largest, from, to); });
}

void settle(const Params& p, const float* largest, float* factors) {
  with_types(p, [&](auto&& quantizer) { quantizer.settle_all(largest, factors); });
}

void encode_pieces(const Params& p, const float* factors, int64_t from, int64_t to) {
  with_types(p, [&](auto&& quantizer) { quantizer.encode_pieces(factors, from, to); });
}

}  // namespace accel::ACCEL_ISA::fp8
