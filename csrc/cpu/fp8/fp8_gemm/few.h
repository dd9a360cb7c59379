// Products of few rows, which take as long as reading the codes of b: these are decoded in registers.
#pragma once

#include "tasks.h"

namespace accel::ACCEL_ISA::fp8 {

template <bool PAIRS, typename F>
inline void decode_words(vh2 codes, vf* words) {
  if constexpr (PAIRS)
    decode_pairs<F>(codes, words);
  else
    decode<F>(codes, words);
}

// What decode does not tell: outputs whose codes have a NaN are NaN.
template <typename F>
[[gnu::noinline]] void mark_nans(const Params& p, int64_t output, int outputs, float* out, int64_t ldo) {
  for (int o = 0; o < outputs; ++o) {
    const F* const row = static_cast<const F*>(p.b) + (output + o) * p.depth;
    if (std::any_of(row, row + p.depth, [](F code) { return (code.bits & 0x7f) == 0x7f; }))
      for (int64_t r = 0; r < p.rows; ++r) out[r * ldo + o] = std::numeric_limits<float>::quiet_NaN();
  }
}

template <typename A, typename F, int R>
class Few {
 public:
  explicit Few(const Params& p)
      : p(p), x(steps() * R * VECTORS * W), a_scales(p.count * R), factors(O * p.count * R) {
    pack();
  }

  // out[r · ldo + o] for outputs [output, output + outputs).
  void multiply(int64_t output, int outputs, float* out, int64_t ldo) {
    int o = 0;
    for (; o + O <= outputs; o += O) dots<O>(output + o, out + o, ldo);
    for (; o < outputs; ++o) dots<1>(output + o, out + o, ldo);
  }

 private:
  static constexpr bool PAIRS = PAIRS_OF<A>;
  static constexpr int VECTORS = STEP_VECTORS<PAIRS>;
  // Outputs at a time. Codes are read as they lie in memory, which is fastest in one stream; but rows of x that the first
  // cache does not hold had better be read less often.
  static constexpr int O = R >= 4 && W == 16 ? 2 : 1;

  int64_t steps() const {
    int64_t n = 0;
    for (int64_t c = 0; c < p.count; ++c) n += round_up(p.chunks[c].count, STEP) / STEP;
    return n;
  }

  // Steps of all rows in turn, and the scales of their chunks.
  void pack() {
    for (int64_t r = 0; r < R; ++r) {
      const A* const row = static_cast<const A*>(p.a) + r * p.depth;
      const float* const given = p.a_scale ? scales_of(p.a_scale, r, p.a_rows, p.scales) : nullptr;
      float* to = x + r * VECTORS * W;
      for (int64_t c = 0; c < p.count; ++c) {
        const Chunk& chunk = p.chunks[c];
        a_scales[c * R + r] = given ? given[chunk.scale] : 1.0f;
        for (int i = 0; i < chunk.count; i += STEP, to += R * VECTORS * W) {
          vf words[VECTORS];
          load_words<PAIRS>(row + chunk.from + i, chunk.count - i, words);
          for (int v = 0; v < VECTORS; ++v) store(to + v * W, words[v]);
        }
      }
    }
  }

  // What the sums of a chunk are multiplied with, for each row of x.
  const float* factors_of(const float* scales, int slot) {
    float* const to = factors + slot * p.count * R;
    if (made_of[slot] == scales) return to;
    made_of[slot] = scales;
    for (int64_t c = 0; c < p.count; ++c)
      for (int r = 0; r < R; ++r) to[c * R + r] = FACTOR<F> * (scales[p.chunks[c].scale] * a_scales[c * R + r]);
    return to;
  }

  template <int N>
  void dots(int64_t output, float* out, int64_t ldo) {
    constexpr int CHAINS = N * R >= 4 ? 1 : VECTORS;  // sums that do not wait for one another
    const F* rows[N];
    const float* factor[N];
    vf total[N][R];
#pragma GCC unroll 8
    for (int o = 0; o < N; ++o) {
      rows[o] = static_cast<const F*>(p.b) + (output + o) * p.depth;
      factor[o] = factors_of(scales_of(p.b_scale, output + o, p.b_rows, p.scales), o);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[o][r] = vf{};
    }
    const float* step = x;
    Nans<F> nans;
    for (int64_t c = 0; c < p.count; ++c) {
      const Chunk& chunk = p.chunks[c];
      vf sum[N][R][CHAINS];
#pragma GCC unroll 8
      for (int o = 0; o < N; ++o)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int i = 0; i < CHAINS; ++i) sum[o][r][i] = vf{};
      for (int i = 0; i < chunk.count; i += STEP, step += R * VECTORS * W) {
        vf words[N][VECTORS];
#pragma GCC unroll 8
        for (int o = 0; o < N; ++o) {
          const F* const at = rows[o] + chunk.from + i;
          __builtin_prefetch(at + N * STREAM_AHEAD, 0, 2);
          const vh2 codes = load_pairs(at, chunk.count - i);
          nans.look_at(codes);
          decode_words<PAIRS, F>(codes, words[o]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) {
            const vf y = load(step + (r * VECTORS + v) * W);
#pragma GCC unroll 8
            for (int o = 0; o < N; ++o)
              sum[o][r][v % CHAINS] = multiply_add<PAIRS>(sum[o][r][v % CHAINS], words[o][v], y);
          }
      }
#pragma GCC unroll 8
      for (int o = 0; o < N; ++o)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          vf all = sum[o][r][0];
#pragma GCC unroll 4
          for (int i = 1; i < CHAINS; ++i) all += sum[o][r][i];
          total[o][r] += all * factor[o][c * R + r];
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < N; ++o)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) out[r * ldo + o] = sum_lanes(total[o][r])[0];
    if (nans.any()) mark_nans<F>(p, output, N, out, ldo);
  }

  const Params& p;
  Buffer x, a_scales, factors;
  const float* made_of[O]{};
};

template <typename A, typename F, int R = int(FEW_ROWS)>
void multiply_few(const Params& p) {
  if constexpr (R > 1) {
    if (p.rows < R) return multiply_few<A, F, R - 1>(p);
  }
  Few<A, F, R> few(p);
  Buffer tile(R * p.task_columns);
  for (Task task; claim(p, task);) {
    few.multiply(task.column, task.columns, tile, p.task_columns);
    finish_tile(p, task, tile, p.task_columns);
  }
}

}  // namespace accel::ACCEL_ISA::fp8
