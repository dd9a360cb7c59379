// Products of few rows, which take as long as reading the codes of b: these are decoded in registers.
#pragma once

#include "tasks.h"

namespace accel::ACCEL_ISA::fp8 {

// The rows of a in fp32, in steps, and their scales.
struct Steps {
  const float* x;
  int64_t ldx;
  const float* scales;  // of each row p.count
};

// What decode does not tell: outputs whose codes have a NaN are NaN.
template <typename F>
[[gnu::noinline]] void mark_nans(const Params& p, int64_t output, int outputs, float* out, int64_t ldo) {
  for (int o = 0; o < outputs; ++o) {
    const F* const row = static_cast<const F*>(p.b) + (output + o) * p.depth;
    if (std::any_of(row, row + p.depth, [](F code) { return (code.bits & 0x7f) == 0x7f; }))
      for (int64_t r = 0; r < p.rows; ++r) out[r * ldo + o] = std::numeric_limits<float>::quiet_NaN();
  }
}

// out[r · ldo + o] for outputs [output, output + O) and rows [0, R).
template <typename F, int O, int R>
inline void dots(const Params& p, const Steps& a, int64_t output, float* out, int64_t ldo) {
  const F* rows[O];
  const float* scales[O];
  vf total[O][R];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    rows[o] = static_cast<const F*>(p.b) + (output + o) * p.depth;
    scales[o] = scales_of(p.b_scale, output + o, p.b_rows, p.scales);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[o][r] = vf{};
  }
  const float* x = a.x;
  Nans<F> nans;
  for (int64_t c = 0; c < p.count; ++c) {
    const Chunk& chunk = p.chunks[c];
    vf sum[O][R];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[o][r] = vf{};
    for (int i = 0; i < chunk.count; i += STEP, x += STEP) {
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) {
        const F* at = rows[o] + chunk.from + i;
        __builtin_prefetch(at + 2 * O * p.depth, 0, 2);  // each row is too short for the processor to foresee the next
        const vh2 codes = load_pairs(at, chunk.count - i);
        nans.look_at(codes);
        vf w[4];
        decode<F>(codes, w);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) sum[o][r] += w[v] * load(x + r * a.ldx + v * W);
      }
    }
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        total[o][r] += (sum[o][r] * FACTOR<F>) * (scales[o][chunk.scale] * a.scales[r * p.count + c]);
  }
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[r * ldo + o] = sum_lanes(total[o][r])[0];
  if (nans.any()) mark_nans<F>(p, output, O, out, ldo);
}

template <typename F, int R>
void dot_rows(const Params& p, const Steps& a, int64_t output, int outputs, float* out, int64_t ldo) {
  constexpr int O = std::max(1, std::min(8, (W == 16 ? 24 : 8) / R));  // sums that registers hold
  int o = 0;
  for (; o + O <= outputs; o += O) dots<F, O, R>(p, a, output + o, out + o, ldo);
  for (; o < outputs; ++o) dots<F, 1, R>(p, a, output + o, out + o, ldo);
}

template <typename F, int R = int(FEW_ROWS)>
inline void dot_few(const Params& p, const Steps& a, int64_t output, int outputs, float* out, int64_t ldo) {
  if constexpr (R > 1) {
    if (p.rows < R) return dot_few<F, R - 1>(p, a, output, outputs, out, ldo);
  }
  dot_rows<F, R>(p, a, output, outputs, out, ldo);
}

template <typename A>
void pack_steps(const Params& p, float* x, int64_t ldx, float* scales) {
  for (int64_t r = 0; r < p.rows; ++r, scales += p.count) {
    const A* const row = static_cast<const A*>(p.a) + r * p.depth;
    const float* const given = p.a_scale ? scales_of(p.a_scale, r, p.a_rows, p.scales) : nullptr;
    float* dst = x + r * ldx;
    for (int64_t c = 0; c < p.count; ++c) {
      const Chunk& chunk = p.chunks[c];
      scales[c] = given ? given[chunk.scale] : 1.0f;
      for (int i = 0; i < chunk.count; i += STEP, dst += STEP) {
        vf some[4];
        load_step(row + chunk.from + i, chunk.count - i, some);
        for (int v = 0; v < 4; ++v) store(dst + v * W, some[v] * FACTOR<A>);
      }
    }
  }
}

template <typename A, typename F>
void multiply_few(const Params& p) {
  int64_t ldx = 0;
  for (int64_t c = 0; c < p.count; ++c) ldx += round_up(p.chunks[c].count, STEP);
  Buffer x(p.rows * ldx), scales(p.rows * p.count), tile(p.rows * p.task_columns);
  pack_steps<A>(p, x, ldx, scales);
  const Steps a{x, ldx, scales};
  for (Task task; claim(p, task);) {
    dot_few<F>(p, a, task.column, task.columns, tile, p.task_columns);
    finish_tile(p, task, tile, p.task_columns);
  }
}

}  // namespace accel::ACCEL_ISA::fp8
