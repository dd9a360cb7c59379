// Numbers of eight bits in memory, fp32 in registers: accel/ops/fp8/formats.py defines them. Only integer arithmetic and
// exact steps, so that every level gives the same bits.
#pragma once

#include "_simd.h"

namespace accel::ACCEL_ISA {

// LEAST is the biased exponent, in fp32, of the least normal number.
struct e4m3 {
  static constexpr int MANTISSA = 3, LEAST = 121;
  uint8_t bits;
};
struct e5m2 {
  static constexpr int MANTISSA = 2, LEAST = 113;
  uint8_t bits;
};

typedef uint8_t vb __attribute__((vector_size(W)));
typedef uint8_t vb_unaligned __attribute__((vector_size(W), aligned(1), may_alias));

constexpr uint32_t MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000;

inline vu where(Lanes c, vu a, vu b) {
  return reinterpret_cast<vu>(where(c, reinterpret_cast<vi>(a), reinterpret_cast<vi>(b)));
}

inline vi max(vi a, vi b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vi>(_mm512_max_epi32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_max_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return a > b ? a : b;
#endif
}

// --- fp32 to codes ---

// A code in each word, of numbers that are not above the largest, to nearest with ties to even. The sum with a power of two
// whose last bit is a step of the format rounds at that step, and its last bits count the steps.
template <typename F>
inline vu codes_of(vf y) {
  constexpr int SHIFT = 23 - F::MANTISSA;
  const vu bits = reinterpret_cast<vu>(y), size = bits & MAGNITUDE;
  const vu exponent = reinterpret_cast<vu>(max(reinterpret_cast<vi>(size & INFINITE), vi{} + (F::LEAST << 23)));
  const vu power = exponent + (uint32_t(SHIFT) << 23);
  const vu steps = reinterpret_cast<vu>(reinterpret_cast<vf>(size) + reinterpret_cast<vf>(power)) - power;
  const vu sign = (bits >> 24) & 0x80u;
  const vu code = (steps + (exponent >> SHIFT) - uint32_t(F::LEAST << F::MANTISSA)) | sign;
  vu other = vu{} + 0x7fu;
  if constexpr (F::MANTISSA == 2) other = where(below(reinterpret_cast<vi>(size), vi{} + int(INFINITE + 1)), sign | 0x7cu, other);
  return where(below(reinterpret_cast<vi>(size), vi{} + int(INFINITE)), code, other);
}

// The low bytes of words.
inline void store_bytes(void* p, vu x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(x)));
#else
  *static_cast<vb_unaligned*>(p) = __builtin_convertvector(x, vb);
#endif
}

// Two vectors of codes in the order of load_two<T>.
template <typename T>
inline void store_two_bytes(uint8_t* p, vu a, vu b) {
  if constexpr (std::is_same_v<T, bf16>) {
    const vu pairs = a | (b << 8);
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(pairs)));
#else
    *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(pairs, vh);
#endif
  } else {
    store_bytes(p, a), store_bytes(p + W, b);
  }
}

}  // namespace accel::ACCEL_ISA
