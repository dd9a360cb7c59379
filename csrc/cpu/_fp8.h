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

typedef int16_t vs2 __attribute__((vector_size(W * 4)));  // as vh2, with signs

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

inline vs2 max(vs2 a, vs2 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vs2>(_mm512_max_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
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

// --- codes to fp32 ---

template <typename T>
constexpr bool IS_CODE = std::is_same_v<T, e4m3> || std::is_same_v<T, e5m2>;

// What decoded numbers are yet to be multiplied with: read as an fp16, whose exponents go down to −14, an e4m3 is 2⁸ too
// small.
#if defined(__F16C__) && !defined(__AVX512VBMI__)
template <typename T>
constexpr float FACTOR = std::is_same_v<T, e4m3> ? 256.0f : 1.0f;
#else
template <typename T>
constexpr float FACTOR = 1.0f;
#endif

// The numbers of codes, a word each, by integer arithmetic.
template <typename F>
inline vf numbers_of(vu code) {
  constexpr int SHIFT = 23 - F::MANTISSA;
  constexpr uint32_t NORMAL = 1u << F::MANTISSA, OTHER = F::MANTISSA == 3 ? 0x7f : 0x7c;
  const vu size = code & 0x7fu;
  const vf normal = reinterpret_cast<vf>((size << SHIFT) + (uint32_t(F::LEAST - 1) << 23));
  const vf step = reinterpret_cast<vf>(vu{} + (uint32_t(F::LEAST - F::MANTISSA) << 23));
  const vf subnormal = __builtin_convertvector(reinterpret_cast<vi>(size), vf) * step;
  const vf other = reinterpret_cast<vf>((size << SHIFT) | INFINITE);  // a NaN where the mantissa is not 0
  const vf finite = where(below(reinterpret_cast<vi>(size), vi{} + int(NORMAL)), subnormal, normal);
  const vf x = where(below(reinterpret_cast<vi>(size), vi{} + int(OTHER)), finite, other);
  return reinterpret_cast<vf>(reinterpret_cast<vu>(x) | ((code & 0x80u) << 24));
}

inline float to_float(e4m3 x) { return numbers_of<e4m3>(vu{} + x.bits)[0]; }
inline float to_float(e5m2 x) { return numbers_of<e5m2>(vu{} + x.bits)[0]; }

// A step is 4·W elements in the order in which codes are decoded with the least effort: in vectors 0 and 1 those at even
// places, in 2 and 3 those at odd ones.
constexpr int STEP = 4 * W;

template <int FIRST, int... I>
inline vf every_other(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + FIRST)...);
}
template <int FROM, int... I>
inline vf in_turn(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & 1) * W + FROM + I / 2)...);
}

// The order in which elements lie, from that of steps.
inline void put_in_order(vf* x) {
  constexpr auto ALL = std::make_integer_sequence<int, W>{};
  const vf a = x[0], b = x[1], c = x[2], d = x[3];
  x[0] = in_turn<0>(a, c, ALL), x[1] = in_turn<W / 2>(a, c, ALL);
  x[2] = in_turn<0>(b, d, ALL), x[3] = in_turn<W / 2>(b, d, ALL);
}

// The first n of a step's codes, as pairs, zeros behind them.
template <typename F>
inline vh2 load_pairs(const F* p, int64_t n) {
  if (n >= STEP) return *reinterpret_cast<const vh2_unaligned*>(p);
#if defined(__AVX512BW__)
  return reinterpret_cast<vh2>(_mm512_maskz_loadu_epi8((uint64_t(1) << n) - 1, p));  // no call: registers stay where they are
#else
  alignas(64) F some[STEP]{};
  std::memcpy(some, p, size_t(n));
  return *reinterpret_cast<const vh2_unaligned*>(some);
#endif
}

#if defined(__AVX512VBMI__)
// The numbers of codes without their signs, as bf16, which holds all of them: subnormal ones are normal there.
template <typename F>
struct Table {
  alignas(64) uint8_t low[128], high[128];

  constexpr Table() : low{}, high{} {
    for (int code = 0; code < 128; ++code) low[code] = uint8_t(number(code)), high[code] = uint8_t(number(code) >> 8);
  }

  static constexpr int number(int code) {
    constexpr int SHIFT = 7 - F::MANTISSA, NORMAL = 1 << F::MANTISSA, OTHER = F::MANTISSA == 3 ? 0x7f : 0x7c;
    if (code >= OTHER) return code == 0x7c ? 0x7f80 : 0x7fc0;
    if (code >= NORMAL || code == 0) return code ? (code << SHIFT) + ((F::LEAST - 1) << 7) : 0;
    int power = 0;
    while (code >> (power + 1)) ++power;
    return ((F::LEAST - F::MANTISSA + power) << 7) | ((code << (7 - power)) & 0x7f);
  }
};
template <typename F>
constexpr Table<F> TABLE;

// The numbers of a step as bf16 in the order of their codes.
template <typename F>
inline void decode_pairs(vh2 codes, vf* pairs) {
  // the bytes that are put beside one another below are those of the same 16 bytes of two vectors
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i code = _mm512_permutexvar_epi64(order, reinterpret_cast<__m512i>(codes));
  const auto look_up = [&](const uint8_t* table) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), code, _mm512_load_si512(table + 64));
  };
  const __m512i low = look_up(TABLE<F>.low), high = look_up(TABLE<F>.high);
  constexpr int A_OR_B_AND_C = 0xf8;
  const __m512i signed_ = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(-128), A_OR_B_AND_C);
  pairs[0] = reinterpret_cast<vf>(_mm512_unpacklo_epi8(low, signed_));
  pairs[1] = reinterpret_cast<vf>(_mm512_unpackhi_epi8(low, signed_));
}

// Codes of two rows, each of the first beside that of the second.
inline void mate_codes(vh2 first, vh2 second, vh2* mated) {
  struct Order {
    alignas(64) uint8_t from[128];
    constexpr Order() : from{} {
      for (int i = 0; i < 128; ++i) from[i] = uint8_t(i / 2 + i % 2 * 64);
    }
  };
  static constexpr Order ORDER;
  const __m512i a = reinterpret_cast<__m512i>(first), b = reinterpret_cast<__m512i>(second);
  for (int i = 0; i < 2; ++i)
    mated[i] = reinterpret_cast<vh2>(_mm512_permutex2var_epi8(a, _mm512_load_si512(ORDER.from + 64 * i), b));
}
#elif defined(__F16C__)
// fp32 of the first and of the last W halves.
inline void widen(vh2 halves, vf& first, vf& last) {
#if defined(__AVX512F__)
  // through memory: a conversion from there needs no shuffle, which would be half of a step's work
  asm("" : "+m"(halves));
  const __m256i* const half = reinterpret_cast<const __m256i*>(&halves);
  first = reinterpret_cast<vf>(_mm512_maskz_cvtph_ps(0xffff, half[0]));
  last = reinterpret_cast<vf>(_mm512_maskz_cvtph_ps(0xffff, half[1]));
#else
  const __m256i x = reinterpret_cast<__m256i>(halves);
  first = reinterpret_cast<vf>(_mm256_cvtph_ps(_mm256_castsi256_si128(x)));
  last = reinterpret_cast<vf>(_mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
#endif
}
#endif

// The numbers of a step over FACTOR<F>. By fp16 all but NaN of e4m3, which none of its bits stands for: see Nans.
template <typename F>
inline void decode(vh2 codes, vf* x) {
#if defined(__AVX512VBMI__)
  vf pairs[2];
  decode_pairs<F>(codes, pairs);
  for (int i = 0; i < 2; ++i) {
    const vu words = reinterpret_cast<vu>(pairs[i]);
    x[i] = reinterpret_cast<vf>(words << 16), x[2 + i] = reinterpret_cast<vf>(words & 0xffff0000u);
  }
#elif defined(__F16C__)
  vh2 even = codes << 8, odd = codes & uint16_t(0xff00);
  if constexpr (std::is_same_v<F, e4m3>) {  // an exponent of four bits where fp16 has five
    even = reinterpret_cast<vh2>(reinterpret_cast<vs2>(even) >> 1) & uint16_t(0xbf80);
    odd = reinterpret_cast<vh2>(reinterpret_cast<vs2>(codes) >> 1) & uint16_t(0xbf80);
  }
  widen(even, x[0], x[1]), widen(odd, x[2], x[3]);
#else
  const vu words = reinterpret_cast<vu>(codes);
  const vf a = numbers_of<F>(words & 0xffu), b = numbers_of<F>((words >> 8) & 0xffu);
  const vf c = numbers_of<F>((words >> 16) & 0xffu), d = numbers_of<F>(words >> 24);
  constexpr auto ALL = std::make_integer_sequence<int, W>{};
  x[0] = in_turn<0>(a, c, ALL), x[1] = in_turn<W / 2>(a, c, ALL);
  x[2] = in_turn<0>(b, d, ALL), x[3] = in_turn<W / 2>(b, d, ALL);
#endif
}

// Whether any of the codes that were looked at is a NaN which decode does not make one.
template <typename F>
class Nans {
 public:
#if defined(__F16C__) && !defined(__AVX512VBMI__)
  void look_at(vh2 codes) {
    if constexpr (std::is_same_v<F, e4m3>) most_ = max_bytes(most_, add_bytes(codes, codes));  // without their signs
  }
  bool any() const {
    if constexpr (!std::is_same_v<F, e4m3>) return false;
#if defined(__AVX512F__)
    return _mm512_cmpeq_epi8_mask(reinterpret_cast<__m512i>(most_), _mm512_set1_epi8(-2)) != 0;
#else
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(reinterpret_cast<__m256i>(most_), _mm256_set1_epi8(-2))) != 0;
#endif
  }

 private:
#if defined(__AVX512F__)
  static vh2 add_bytes(vh2 a, vh2 b) {
    return reinterpret_cast<vh2>(_mm512_add_epi8(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
  static vh2 max_bytes(vh2 a, vh2 b) {
    return reinterpret_cast<vh2>(_mm512_max_epu8(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
#else
  static vh2 add_bytes(vh2 a, vh2 b) {
    return reinterpret_cast<vh2>(_mm256_add_epi8(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
  }
  static vh2 max_bytes(vh2 a, vh2 b) {
    return reinterpret_cast<vh2>(_mm256_max_epu8(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
  }
#endif
  vh2 most_{};
#else
  void look_at(vh2) {}
  bool any() const { return false; }
#endif
};

template <typename F>
[[gnu::noinline]] void decode_one_by_one(vh2 codes, vf* x) {
  alignas(64) F some[STEP];
  std::memcpy(some, &codes, sizeof some);
  for (int i = 0; i < STEP; ++i) x[i % 2 * 2 + i / (2 * W)][i / 2 % W] = to_float(some[i]) * (1.0f / FACTOR<F>);
}

template <typename F>
inline void decode_all(vh2 codes, vf* x) {
  decode<F>(codes, x);
  Nans<F> nans;
  nans.look_at(codes);
  if (__builtin_expect(nans.any(), 0)) decode_one_by_one<F>(codes, x);
}

// The first n elements of a step, zeros behind them, over FACTOR<T>.
template <typename T>
inline void load_step(const T* p, int64_t n, vf* x) {
  if constexpr (IS_CODE<T>) {
    decode_all<T>(load_pairs(p, n), x);
  } else {
    vf each[4];
    for (int i = 0; i < 4; ++i) each[i] = n > i * W ? load_some(p + i * W, n - i * W) : vf{};
    constexpr auto ALL = std::make_integer_sequence<int, W>{};
    x[0] = every_other<0>(each[0], each[1], ALL), x[1] = every_other<0>(each[2], each[3], ALL);
    x[2] = every_other<1>(each[0], each[1], ALL), x[3] = every_other<1>(each[2], each[3], ALL);
  }
}

#if defined(__AVX512VBMI__)
// The same as pairs of bf16, in their order.
template <typename T>
inline void load_step_pairs(const T* p, int64_t n, vf* pairs) {
  if constexpr (IS_CODE<T>) {
    decode_pairs<T>(load_pairs(p, n), pairs);
  } else {
    static_assert(std::is_same_v<T, bf16>);
    const auto some = [](int64_t left) { return left >= 2 * W ? ~0u : left > 0 ? (1u << left) - 1 : 0u; };
    for (int i = 0; i < 2; ++i)
      pairs[i] = reinterpret_cast<vf>(_mm512_maskz_loadu_epi16(some(n - i * 2 * W), p + i * 2 * W));
  }
}
#endif

// The same as they lie, themselves.
template <typename T>
inline void load_in_order(const T* p, int64_t n, vf* x) {
  if constexpr (IS_CODE<T>) {
    decode_all<T>(load_pairs(p, n), x);
    put_in_order(x);
    for (int i = 0; i < 4; ++i) x[i] *= FACTOR<T>;
  } else {
    for (int i = 0; i < 4; ++i) x[i] = n > i * W ? load_some(p + i * W, n - i * W) : vf{};
  }
}

}  // namespace accel::ACCEL_ISA
