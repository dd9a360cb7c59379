// bfloat16 and half precision by hand, rounding to nearest even as the device does.
#pragma once

#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 a) { return std::bit_cast<float>(uint32_t{a.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  uint32_t u = std::bit_cast<uint32_t>(a);
  if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

inline float __half2float(__half a) {
  uint32_t sign = uint32_t{a.bits} >> 15 << 31, exponent = a.bits >> 10 & 31, fraction = a.bits & 0x3ff;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
  float tiny = float(fraction) * 0x1p-24f;
  return sign ? -tiny : tiny;
}

inline __half __float2half_rn(float a) {
  uint32_t u = std::bit_cast<uint32_t>(a), sign = u >> 31 << 15, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return {0x7fff};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds past the largest, 65504
  if (rest < 0x38800000) {  // subnormal: adding 1/2 leaves the multiple of 2^-24 in the low bits, rounded
    float shifted = std::bit_cast<float>(rest) + 0.5f;
    return {uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  rest += 0xfff + (rest >> 13 & 1);
  return {uint16_t(sign | (rest - 0x38000000) >> 13)};
}

inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {__bfloat162float(a.x), __bfloat162float(a.y)}; }
inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
