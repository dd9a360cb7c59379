// As many multiply-adds as this instruction set can issue: independent sums in registers, more of them than are under
// way at once (two units, four cycles each), few enough that the oldest set has registers for them.

#include "params.h"

#include "cpu/_simd.h"

namespace accel::ACCEL_ISA {
namespace {

constexpr int SUMS = 12;

// `step(sum)` is one instruction that does `flops` FLOPs.
template <typename Step>
int64_t repeat(int64_t rounds, float* left, int64_t flops, const Step& step) {
  vf sums[SUMS];
  for (int i = 0; i < SUMS; ++i) sums[i] = splat(float(i) + 0.25f);  // all different, or they would be computed once
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; ++i) sums[i] = step(sums[i]);
  }
  vf total{};
  for (int i = 0; i < SUMS; ++i) total += sums[i];
  *left = sum_lanes(total)[0];
  return rounds * SUMS * flops;
}

}  // namespace

int64_t multiply_add_f32(int64_t rounds, float* left) {
  const vf half = splat(0.5f), one = splat(1.0f);  // sums stay near 2: no infinities, no subnormal numbers
  return repeat(rounds, left, 2 * W, [&](vf sum) { return sum * half + one; });
}

#if defined(__AVX512BF16__)
int64_t multiply_add_bf16(int64_t rounds, float* left) {
  const __m512bh halves = reinterpret_cast<__m512bh>(splat(0.5f));  // one of each pair is 0.5, the other 0
  return repeat(rounds, left, 4 * W, [&](vf sum) {
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), halves, halves));
  });
}
#else
int64_t multiply_add_bf16(int64_t rounds, float* left) { return multiply_add_f32(rounds, left); }
#endif

}  // namespace accel::ACCEL_ISA
