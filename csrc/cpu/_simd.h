// Vectors of floats for one instruction set. Included by kernel files, which are compiled once per level with
// ACCEL_ISA naming the namespace and ACCEL_WIDTH the floats in a register; everything lives in that namespace, so
// that no AVX-512 body can be picked by the linker for a machine without it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace accel::ACCEL_ISA {

constexpr int W = ACCEL_WIDTH;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef uint16_t vh2 __attribute__((vector_size(W * 4)));  // two halves of each word
typedef uint16_t vh2_unaligned __attribute__((vector_size(W * 4), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }

// Subnormal numbers count as zero while this lives: masked weights and small gradients are full of them, and on x86
// each costs a hundred cycles.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
#endif
};

// --- bf16 and fp16 in memory, fp32 in registers ---

inline vf load(const bf16* p) {
#if defined(__AVX512F__)  // g++ 12 widens in two halves by itself
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<vf>(reinterpret_cast<vu>(_mm512_maskz_cvtepu16_epi32(0xffff, x)) << 16);
#else
  vh h = *reinterpret_cast<const vh_unaligned*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}

// The bits of x as a bf16, to nearest with ties to even, in the upper half of each word; what is below is of no use.
inline vu round_to_bf16(vf x) {
  const vu u = reinterpret_cast<vu>(x), nan = reinterpret_cast<vu>(x != x);
  return ((u + 0x7fffu + ((u >> 16) & 1u)) & ~nan) | (nan & 0x7fc00000u);
}

inline void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))));
#else
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(round_to_bf16(x) >> 16, vh);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float to_float(fp16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023, u;
  if (exponent == 31) {
    u = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent == 0) {
    float f = float(mantissa) * 0x1p-24f;
    return sign ? -f : f;
  } else {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline void from_float(float x, float* p) { *p = x; }
inline void from_float(float x, bf16* p) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void from_float(float x, fp16* p) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    p->bits = uint16_t(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or is infinite
    p->bits = uint16_t(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the hardware round at 2^-24
    float f;
    std::memcpy(&f, &magnitude, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    p->bits = uint16_t(sign | (u - 0x3f000000u));
  } else {
    p->bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
  }
}

inline vf load(const fp16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

inline void store(fp16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(x), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#else
  for (int i = 0; i < W; ++i) from_float(x[i], p + i);
#endif
}

// Words of first[i] and second[i], each rounded to bf16.
inline vh2 mated(vf first, vf second);

// Two vectors of elements, in whichever order costs least; only store_two knows it. Halves of words widen by a shift and
// a mask, where vectors of 16-bit numbers take two operations each of which crosses the register.
template <typename T>
inline void load_two(const T* p, vf& a, vf& b) {
  if constexpr (std::is_same_v<T, bf16>) {
    const vh2 halves = *reinterpret_cast<const vh2_unaligned*>(p);
    const vu words = reinterpret_cast<vu>(halves);
    a = reinterpret_cast<vf>(words << 16), b = reinterpret_cast<vf>(words & 0xffff0000u);
  } else {
    a = load(p), b = load(p + W);
  }
}

template <typename T>
inline void store_two(T* p, vf a, vf b) {
  if constexpr (std::is_same_v<T, bf16>) {
    *reinterpret_cast<vh2_unaligned*>(p) = mated(a, b);
  } else {
    store(p, a), store(p + W, b);
  }
}

// dst[0..padded) = src[0..n), zeros behind; padded is a multiple of W.
template <typename T>
inline void load_row(const T* src, float* dst, int n, int padded) {
  int i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
  for (; i < padded; ++i) dst[i] = 0.0f;
}

// The first n elements, zeros behind them.
template <typename T>
inline vf load_some(const T* p, int64_t n) {
  if (n >= W) return load(p);
  alignas(64) T some[W]{};
  std::memcpy(some, p, size_t(n) * sizeof(T));
  return load(some);
}

template <typename T>
inline void store_row(T* dst, const float* src, int n, float mul) {
  int i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i) * mul);
  for (; i < n; ++i) from_float(src[i] * mul, dst + i);
}

// --- conditions: which lanes something holds in ---

// g++ 12 carries the comparisons of AVX-512 from mask registers to vectors and back, which takes longer than they do.
#if defined(__AVX512F__)
typedef __mmask16 Lanes;
inline Lanes both(Lanes a, Lanes b) { return Lanes(a & b); }
inline Lanes from_to(vf x, float low, vf high) {
  const __m512 v = reinterpret_cast<__m512>(x);
  return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, _mm512_set1_ps(low), _CMP_GE_OQ), v,
                                 reinterpret_cast<__m512>(high), _CMP_LT_OQ);
}
inline Lanes below(vi x, vi high) {
  return _mm512_cmplt_epu32_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(high));
}
inline vf where(Lanes c, vf a, vf b) {
  return reinterpret_cast<vf>(_mm512_mask_mov_ps(reinterpret_cast<__m512>(b), c, reinterpret_cast<__m512>(a)));
}
inline vi where(Lanes c, vi a, vi b) {
  return reinterpret_cast<vi>(_mm512_mask_mov_epi32(reinterpret_cast<__m512i>(b), c, reinterpret_cast<__m512i>(a)));
}
#else
typedef vi Lanes;  // all ones where it holds, else 0
inline Lanes both(Lanes a, Lanes b) { return a & b; }
inline Lanes from_to(vf x, float low, vf high) { return (x >= low) & (x < high); }  // not for a NaN
inline Lanes below(vi x, vi high) { return reinterpret_cast<vu>(x) < reinterpret_cast<vu>(high); }  // nor for x < 0
inline vf where(Lanes c, vf a, vf b) { return c ? a : b; }
inline vi where(Lanes c, vi a, vi b) { return c ? a : b; }
#endif

// The largest integer that is not above x; |x| < 2^31.
inline vi floor_of(vf x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vi>(_mm512_cvt_roundps_epi32(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
#else
  const vi n = __builtin_convertvector(x, vi);  // truncated towards 0
  return n + (__builtin_convertvector(n, vf) > x);  // true is −1
#endif
}

// --- shuffles, reductions, transposition ---

template <int S, int... I>
inline vf swap_blocks(vf x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ S)...);
}

// Sum (or maximum) of all lanes, in every lane.
template <int S = W / 2>
inline vf sum_lanes(vf x) {
  x = x + swap_blocks<S>(x, std::make_integer_sequence<int, W>{});
  if constexpr (S > 1) return sum_lanes<S / 2>(x);
  return x;
}
inline vf max(vf a, vf b) {  // a NaN in a stays
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
#elif defined(__AVX__)
  return reinterpret_cast<vf>(_mm256_max_ps(reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(a)));
#else
  return a < b ? b : a;
#endif
}
inline vf min(vf a, vf b) {  // b where one of them is a NaN
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
  return reinterpret_cast<vf>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}
template <int S = W / 2>
inline vf max_lanes(vf x) {
  x = max(x, swap_blocks<S>(x, std::make_integer_sequence<int, W>{}));
  if constexpr (S > 1) return max_lanes<S / 2>(x);
  return x;
}

template <int S, int... I>
inline void exchange(vf& a, vf& b, std::integer_sequence<int, I...>) {
  vf low = __builtin_shufflevector(a, b, ((I & S) ? W + I - S : I)...);
  vf high = __builtin_shufflevector(a, b, ((I & S) ? W + I : I + S)...);
  a = low, b = high;
}
template <int S = 1>
inline void transpose_block(vf* r) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) exchange<S>(r[i], r[i + S], std::make_integer_sequence<int, W>{});
  if constexpr (S * 2 < W) transpose_block<S * 2>(r);
}

// dst (cols × ldd) = [mul ·] transpose of src (rows × lds); rows and cols multiples of W. Without a factor the words
// may be anything, such as pairs of bf16.
template <bool SCALED>
inline void transpose(const float* src, int64_t lds, float* dst, int64_t ldd, int rows, int cols, float mul) {
  for (int i = 0; i < rows; i += W)
    for (int j = 0; j < cols; j += W) {
      vf r[W];
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) r[k] = load(src + (i + k) * lds + j);
      transpose_block(r);
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) store(dst + (j + k) * ldd + i, SCALED ? r[k] * mul : r[k]);
    }
}
inline void transpose(const float* src, int64_t lds, float* dst, int64_t ldd, int rows, int cols, float mul) {
  transpose<true>(src, lds, dst, ldd, rows, cols, mul);
}
inline void transpose(const float* src, int64_t lds, float* dst, int64_t ldd, int rows, int cols) {
  transpose<false>(src, lds, dst, ldd, rows, cols, 1.0f);
}

// --- pairs of bf16 in a word, for processors that multiply those ---

// Whether products of T are made of pairs of bf16. fp16 has three bits more than those and goes to fp32.
#if defined(__AVX512BF16__)
template <typename T>
constexpr bool IN_PAIRS = std::is_same_v<T, bf16>;
#else
template <typename T>
constexpr bool IN_PAIRS = false;
#endif

// dst = two vectors rounded to bf16, one behind the other.
void store_halves(float* dst, vf first, vf second);

// Whether none of a word's worth of bf16 in every lane is infinite or a NaN.
bool all_finite(vh2 x);

// Mates two rows of n words: dst[2·i], dst[2·i + 1] = the halves of first's word i, each beside that of second's.
void mate_rows(const float* first, const float* second, float* dst, int n);

inline void store_mated(float* dst, vf first, vf second) { store(dst, reinterpret_cast<vf>(mated(first, second))); }

#if !defined(__AVX512BF16__)
inline vh2 mated(vf first, vf second) {
  return reinterpret_cast<vh2>((round_to_bf16(first) >> 16) | (round_to_bf16(second) & 0xffff0000u));
}
#else
inline bool all_finite(vh2 x) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(reinterpret_cast<__m512i>(x), exponent), exponent) == 0;
}

inline void store_halves(float* dst, vf first, vf second) {
  const __m512bh x = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
  _mm512_storeu_si512(dst, reinterpret_cast<__m512i>(x));
}

// Halves i of two operands in turn, from half `from` of each on; the second operand's begin at `second`.
inline __m512i turns(int from, int second) {
  alignas(64) uint16_t order[2 * W];
  for (int i = 0; i < W; ++i) order[2 * i] = uint16_t(from + i), order[2 * i + 1] = uint16_t(second + from + i);
  return _mm512_load_si512(order);
}

inline vh2 mated(vf first, vf second) {
  const __m512bh x = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
  return reinterpret_cast<vh2>(_mm512_permutexvar_epi16(turns(0, W), reinterpret_cast<__m512i>(x)));
}

inline void mate_rows(const float* first, const float* second, float* dst, int n) {
  const __m512i low = turns(0, 2 * W), high = turns(W, 2 * W);
  for (int i = 0; i < n; i += W) {
    const __m512i a = _mm512_loadu_si512(first + i), b = _mm512_loadu_si512(second + i);
    _mm512_storeu_si512(dst + 2 * i, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(dst + 2 * i + W, _mm512_permutex2var_epi16(a, high, b));
  }
}
#endif

// --- powers and logarithms of two ---

// 2^x for x <= 0, relative error below 2e-7; 0 below −126 and at −∞, a NaN stays one.
inline vf exp2_nonpositive(vf x) {
#if defined(__AVX512F__)
  const vf low = splat(-200.0f);  // scalef underflows to 0 by itself
#else
  const vf low = splat(-126.0f);
#endif
  vf clamped = max(x, low);
  vf shifted = clamped + 12582912.0f;  // 1.5 · 2^23: the integer part lands in the low bits
  vf n = shifted - 12582912.0f;
  vf f = clamped - n;
  vf p = splat(1.326472707e-3f);  // relative minimax fit of degree 5 on [−1/2, 1/2], exact at 0
  p = p * f + 9.671512649e-3f;
  p = p * f + 5.550733744e-2f;
  p = p * f + 2.402224209e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  vf y = reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(shifted) << 23));
  y = x < low ? vf{} : y;
  return x == x ? y : x;
#endif
}

// log2 of normal positive x, absolute error below 2e-7; infinities and NaN pass through as NaN or infinity.
inline vf log2_positive(vf x) {
  vi bits = reinterpret_cast<vi>(x);
  vi e = (bits - 0x3f3504f3) >> 23;  // so that the mantissa is in [sqrt(1/2), sqrt(2))
  vf m = reinterpret_cast<vf>(bits - (e << 23));
  vf t = (m - 1.0f) / (m + 1.0f);
  vf s = t * t;
  vf p = splat(0.4121985f);
  p = p * s + 0.5770780f;
  p = p * s + 0.9617967f;
  p = p * s + 2.8853901f;
  vf y = __builtin_convertvector(e, vf) + t * p;
  vf huge = splat(__builtin_huge_valf());
  return x < huge ? y : x;
}

}  // namespace accel::ACCEL_ISA
