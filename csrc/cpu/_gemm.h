// Small matrix products on packed operands, one micro-kernel for every product of an attention core.
#pragma once

#include <algorithm>

#include "_simd.h"

namespace accel::ACCEL_ISA {

// C (M × nv·W) = [init +] A (M × K) · B (K × nv·W). A is read element by element with any strides, so a transposed
// A costs nothing; B and C are row-major in whole vectors. init, if not null, has C's shape and row stride ldi; it
// may be C itself, which accumulates.
//
// With PAIRS the words of A and B are pairs of bf16 whose products are added up: K counts pairs, sizes and strides count
// words, C and init stay fp32, and C = [init +] mul · A·B.
struct Gemm {
  const float* a;
  int64_t row_a, col_a;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  const float* init;
  int64_t ldi;
  int K;
  float mul = 1.0f;  // only with PAIRS, whose operands cannot take a factor without rounding again
  // only if SCALED: the product in row m and column n is multiplied with of_rows[m] · of_columns[n]
  const float* of_rows = nullptr;
  const float* of_columns = nullptr;
};

// Registers hold MR × NV accumulators beside NV vectors of B and one of A.
#if defined(__AVX512F__)
constexpr int MAX_NV = 4;
constexpr int max_rows(int nv) { return nv == 4 ? 6 : nv == 3 ? 8 : 12; }
#else
constexpr int MAX_NV = 2;
constexpr int max_rows(int nv) { return nv == 2 ? 6 : 10; }
#endif

// acc + a · b, in each lane a number or the sum of a pair's products.
template <bool PAIRS>
inline vf multiply_add(vf acc, vf a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (PAIRS)
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(a),
                                                 reinterpret_cast<__m512bh>(b)));
#endif
  return acc + a * b;
}

// One word in every lane, whose bits may be those of a pair.
template <bool PAIRS>
inline vf broadcast(const float* p) {
  if constexpr (!PAIRS) return splat(*p);
  int32_t word;
  std::memcpy(&word, p, 4);
  return reinterpret_cast<vf>(word - vi{});
}

// What is to be done beside the products, see gemm: nothing.
struct Nothing {
  void operator()() const {}
};
constexpr int BETWEEN = 32;  // as many words are added up from one call to the next

template <bool PAIRS, bool SCALED, int MR, int NV, typename Between>
inline void micro(const Gemm& g, int64_t row, int64_t col, Between& between) {
  const float* a = g.a + row * g.row_a;
  const float* b = g.b + col;
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = vf{};
  const int some = std::is_same_v<Between, Nothing> ? g.K : BETWEEN;
  for (int from = 0; from < g.K; from += some) {
    between();
    for (int k = from; k < std::min(g.K, from + some); ++k) {
      vf bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = load(b + v * W);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] = multiply_add<PAIRS>(acc[m][v], broadcast<PAIRS>(a + m * g.row_a), bv[v]);
      a += g.col_a;
      b += g.ldb;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      if constexpr (SCALED)
        acc[m][v] *= g.of_rows[row + m] * load(g.of_columns + col + v * W);
      else if constexpr (PAIRS)
        acc[m][v] *= g.mul;
      // added last: a long sum made of many products is rounded once a product, not once a term
      if (g.init) acc[m][v] += load(g.init + (row + m) * g.ldi + col + v * W);
      store(g.c + (row + m) * g.ldc + col + v * W, acc[m][v]);
    }
}

template <bool PAIRS, bool SCALED, int NV, int MR, typename Between>
inline void micro_rows(const Gemm& g, int rows, int64_t row, int64_t col, Between& between) {
  if constexpr (MR > 1) {
    if (rows < MR) return micro_rows<PAIRS, SCALED, NV, MR - 1>(g, rows, row, col, between);
  }
  micro<PAIRS, SCALED, MR, NV>(g, row, col, between);
}

// Rows split evenly: 49 rows as 10 10 10 10 9 keep every tile busy, where 12 12 12 12 1 would end in a slow one.
template <bool PAIRS, bool SCALED, int NV, typename Between>
inline void panel(const Gemm& g, int M, int64_t col, Between& between) {
  constexpr int MR = max_rows(NV);
  int tiles = (M + MR - 1) / MR;
  for (int t = 0, row = 0; t < tiles; ++t) {
    int rows = (M - row + tiles - t - 1) / (tiles - t);
    micro_rows<PAIRS, SCALED, NV, MR>(g, rows, row, col, between);
    row += rows;
  }
}

// `between` is called beside the products, as often as gemm_calls tells: what it fetches comes while they are made.
template <bool PAIRS = false, bool SCALED = false, typename Between = Nothing>
inline void gemm(const Gemm& g, int M, int nv, Between between = {}) {
  int panels = (nv + MAX_NV - 1) / MAX_NV;
  for (int p = 0, v = 0; p < panels; ++p) {
    int width = (nv - v + panels - p - 1) / (panels - p);
    int64_t col = int64_t(v) * W;
    if (width == 1) panel<PAIRS, SCALED, 1>(g, M, col, between);
    if (width == 2) panel<PAIRS, SCALED, 2>(g, M, col, between);
    if constexpr (MAX_NV >= 4) {
      if (width == 3) panel<PAIRS, SCALED, 3>(g, M, col, between);
      if (width == 4) panel<PAIRS, SCALED, 4>(g, M, col, between);
    }
    v += width;
  }
}

inline int gemm_calls(int M, int nv, int K) {
  int tiles = 0;
  for (int v = 0, panels = (nv + MAX_NV - 1) / MAX_NV, p = 0; p < panels; ++p) {
    const int width = (nv - v + panels - p - 1) / (panels - p);
    tiles += (M + max_rows(width) - 1) / max_rows(width), v += width;
  }
  return tiles * ((K + BETWEEN - 1) / BETWEEN);
}

}  // namespace accel::ACCEL_ISA
