// Bilinear samples of maps whose pixels are rows of channels: the four corners of a position, and weighted sums of rows.
//
// A corner outside of the map has no pixel: it is OUTSIDE, and whoever reads it reads zeros, never a pixel times 0,
// which a NaN in the map would turn into one. Each corner is tested by itself, which makes every derivative the one from
// the right. A position that is NaN, infinite or beyond the border has no corner at all and derivatives of 0.
#pragma once

#include <algorithm>
#include <type_traits>

#include "_scratch.h"
#include "_simd.h"

namespace accel::ACCEL_ISA {

constexpr int32_t OUTSIDE = -1;

inline vi load(const int32_t* p) {
  vi x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(int32_t* p, vi x) { std::memcpy(p, &x, sizeof x); }
inline vi splat_int(int32_t x) { return x - vi{}; }
inline vu load_unsigned(const int32_t* p) { return reinterpret_cast<vu>(load(p)); }

// --- corners of a vector of positions ---

// The index of a pixel is start + row · line + column · step, below 2^31, and `outside` where there is none. Unsigned:
// indices that are not used may wrap.
struct Pitch {
  vu start, line, step;
  vi outside;
};

// Above left, above right, below left, below right.
struct Corners {
  vi at[4];      // as the pitch has it
  vf weight[4];  // finite always, and of no matter where the corner is outside
  vf dy, dx;     // from the upper left corner, in [0, 1)
  Lanes near;    // where the position is near enough to the map to have derivatives
};

// Sizes are below 2^31 pixels, and may be 0.
inline Corners corners_of(vf y, vf x, vi height, vi width, const Pitch& pitch) {
  Corners c;
  const Lanes near_y = from_to(y, -1.0f, __builtin_convertvector(height, vf));
  const Lanes near_x = from_to(x, -1.0f, __builtin_convertvector(width, vf));
  c.near = both(near_y, near_x);
  y = where(near_y, y, splat(-2.0f)), x = where(near_x, x, splat(-2.0f));  // whose corners are all outside
  const vi top = floor_of(y), left = floor_of(x), bottom = top + 1, right = left + 1;
  c.dy = y - __builtin_convertvector(top, vf);
  c.dx = x - __builtin_convertvector(left, vf);
  const Lanes in_top = below(top, height), in_bottom = below(bottom, height);
  const Lanes in_left = below(left, width), in_right = below(right, width);
  const vu above = pitch.start + reinterpret_cast<vu>(top) * pitch.line + reinterpret_cast<vu>(left) * pitch.step;
  const vu under = above + pitch.line;
  c.at[0] = where(both(in_top, in_left), reinterpret_cast<vi>(above), pitch.outside);
  c.at[1] = where(both(in_top, in_right), reinterpret_cast<vi>(above + pitch.step), pitch.outside);
  c.at[2] = where(both(in_bottom, in_left), reinterpret_cast<vi>(under), pitch.outside);
  c.at[3] = where(both(in_bottom, in_right), reinterpret_cast<vi>(under + pitch.step), pitch.outside);
  c.weight[0] = (1.0f - c.dy) * (1.0f - c.dx);
  c.weight[1] = (1.0f - c.dy) * c.dx;
  c.weight[2] = c.dy * (1.0f - c.dx);
  c.weight[3] = c.dy * c.dx;
  return c;
}

// Derivatives of a sample by y and x, from any linear function of its corners (a channel, or a dot product of them).
inline vf slope_y(const vf* corner, vf dx) { return (1.0f - dx) * (corner[2] - corner[0]) + dx * (corner[3] - corner[1]); }
inline vf slope_x(const vf* corner, vf dy) { return (1.0f - dy) * (corner[1] - corner[0]) + dy * (corner[3] - corner[2]); }

// --- the end of a row: fewer elements than a vector has, and no access beyond them ---

template <typename T>
inline vf load_part(const T* p, int n) {
#if defined(__AVX512F__)
  const __mmask16 mask = __mmask16((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(mask, p));
  const __m256i h = _mm256_maskz_loadu_epi16(mask, p);
  if constexpr (std::is_same_v<T, fp16>) return reinterpret_cast<vf>(_mm512_maskz_cvtph_ps(0xffff, h));
  return reinterpret_cast<vf>(reinterpret_cast<vu>(_mm512_maskz_cvtepu16_epi32(0xffff, h)) << 16);
#else
  T row[W] = {};
  std::memcpy(row, p, size_t(n) * sizeof(T));
  return load(row);
#endif
}

template <typename T>
inline void store_part(T* p, vf x, int n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), reinterpret_cast<__m512>(x));
    return;
  }
#endif
  T row[W];
  store(row, x);
  std::memcpy(p, row, size_t(n) * sizeof(T));
}

// Elements 0, 2, 4, … and 1, 3, 5, … of the first 2·n, n at most W.
template <int... I>
inline vf pick(vf low, vf high, std::integer_sequence<int, I...>, int from) {
  return from ? __builtin_shufflevector(low, high, (2 * I + 1)...) : __builtin_shufflevector(low, high, (2 * I)...);
}
inline void load_pairs(const float* p, int n, vf& first, vf& second) {
  const int m = 2 * n;
  const vf low = m < W ? load_part(p, m) : load(p);
  const vf high = m <= W ? vf{} : m < 2 * W ? load_part(p + W, m - W) : load(p + W);
  first = pick(low, high, std::make_integer_sequence<int, W>{}, 0);
  second = pick(low, high, std::make_integer_sequence<int, W>{}, 1);
}

// Elements 4·i + k as lane i of x[k].
inline void load_fours(const float* p, vf (&x)[4]) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  const vf a = load(p), b = load(p + W), c = load(p + 2 * W), d = load(p + 3 * W);
  for (int k = 0; k < 2; ++k) {
    const vf low = pick(a, b, lanes, k), high = pick(c, d, lanes, k);
    x[k] = pick(low, high, lanes, 0), x[k + 2] = pick(low, high, lanes, 1);
  }
}

// Vector v of a row of NV vectors, the last of which has `last` elements if PART (else whole).
template <int NV, bool PART, typename T>
inline vf load_of(const T* row, int v, int last) {
  return PART && v == NV - 1 ? load_part(row + v * W, last) : load(row + v * W);
}
template <int NV, bool PART, typename T>
inline void store_of(T* row, int v, int last, vf x) {
  if (PART && v == NV - 1) {
    store_part(row + v * W, x, last);
  } else {
    store(row + v * W, x);
  }
}

// The whole row's vectors, two by two in the order of load_two; of the last ones, if they're odd or a part, in their own.
template <int NV, bool PART, typename T>
inline void load_all(const T* row, int last, vf (&x)[NV]) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; v += 2) {
    if (v + 1 < NV - int(PART)) {
      load_two(row + v * W, x[v], x[v + 1]);
    } else {
      for (int i = v; i < std::min(v + 2, NV); ++i) x[i] = load_of<NV, PART>(row, i, last);
    }
  }
}
template <int NV, bool PART, typename T>
inline void store_all(T* row, int last, const vf (&x)[NV]) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; v += 2) {
    if (v + 1 < NV - int(PART)) {
      store_two(row + v * W, x[v], x[v + 1]);
    } else {
      for (int i = v; i < std::min(v + 2, NV); ++i) store_of<NV, PART>(row, i, last, x[i]);
    }
  }
}

// store_all of whole cache lines that nobody reads soon: past the caches, without reading what was there.
template <typename T, int NV>
inline void stream_all([[maybe_unused]] T* row, [[maybe_unused]] const vf (&x)[NV]) {
#if defined(__AVX512F__)
  alignas(64) T line[NV * W];  // stays in registers
  store_all<NV, false>(line, W, x);
  for (int i = 0; i + 64 / int(sizeof(T)) <= NV * W; i += 64 / int(sizeof(T)))
    _mm512_stream_ps(reinterpret_cast<float*>(row + i), _mm512_load_ps(line + i));
#endif
}
#if defined(__AVX512F__)
constexpr bool STREAMS = true;
inline void end_of_streams() { _mm_sfence(); }
#else
constexpr bool STREAMS = false;
inline void end_of_streams() {}
#endif

// Calls f.template operator()<NV, PART>(first channel, elements of the last vector) for runs of up to MOST vectors that
// together are n channels.
template <int MOST, typename F>
inline void for_each_run(int64_t n, const F& f) {
  static_assert(MOST == 4);
  int64_t c = 0;
  for (; c + MOST * W <= n; c += MOST * W) f.template operator()<4, false>(c, W);
  const int rest = int(n - c), last = rest % W;
  switch (2 * ((rest + W - 1) / W) + (last != 0)) {
    case 2: return f.template operator()<1, false>(c, W);
    case 3: return f.template operator()<1, true>(c, last);
    case 4: return f.template operator()<2, false>(c, W);
    case 5: return f.template operator()<2, true>(c, last);
    case 6: return f.template operator()<3, false>(c, W);
    case 7: return f.template operator()<3, true>(c, last);
    case 9: return f.template operator()<4, true>(c, last);
  }
}

// --- one sample as a row ---

// The row of pixel `at` of a map whose rows are `stride` elements apart, or `zeros` (as many elements as a row).
template <typename T>
inline T* row_of(T* map, int64_t stride, int32_t at, T* zeros) {
  return at < 0 ? zeros : map + at * stride;
}

// sum[0..n) += weight · row[0..n): how a gradient reaches the pixel of a corner.
template <typename T>
inline void add_row(const T* row, float weight, float* sum, int64_t n) {
  const vf w = splat(weight);
  for_each_run<4>(n, [&]<int NV, bool PART>(int64_t c, int last) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      store_of<NV, PART>(sum + c, v, last,
                         load_of<NV, PART>(sum + c, v, last) + w * load_of<NV, PART>(row + c, v, last));
  });
}

// The sums of the lanes of W vectors, one a lane: 3 operations for each of them. From S on, S vectors of each 2·S being
// parts of the result already.
template <int S = 1>
inline vf sums_of(vf* r) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * S) {
      exchange<S>(r[i], r[i + S], std::make_integer_sequence<int, W>{});
      r[i] += r[i + S];
    }
    return sums_of<2 * S>(r);
  } else {
    return r[0];
  }
}

// Lane l is of the sum of r[l % 4], of which W/4 lanes are yet to be added: sums_of<4> goes on with W/4 such vectors.
inline vf parts_of(vf (&r)[4]) {
  exchange<1>(r[0], r[1], std::make_integer_sequence<int, W>{});
  exchange<1>(r[2], r[3], std::make_integer_sequence<int, W>{});
  r[0] += r[1], r[2] += r[3];
  exchange<2>(r[0], r[2], std::make_integer_sequence<int, W>{});
  return r[0] + r[2];
}

}  // namespace accel::ACCEL_ISA
