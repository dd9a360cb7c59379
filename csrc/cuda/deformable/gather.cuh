// Gathering rows of channels at positions that come from a tensor, and the words both directions share. Maps are
// channels-last: a pixel is a row, read 16 bytes a lane by the lanes of a group, which is a part of a warp.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "launch.cuh"

namespace accel {

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int64_t int_most = (int64_t{1} << 31) - 1;

// --- channels: N neighbouring elements of a row, read at once, computed on in fp32 ---

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

// Two elements of two bytes, the first in the low half.
template <class T>
__device__ __forceinline__ unsigned pair_of(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 two = __floats2half2_rn(x, y);
    return *reinterpret_cast<const unsigned*>(&two);
  } else {
    __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const unsigned*>(&two);
  }
}

template <class T>
constexpr int vector_size = 16 / int(sizeof(T));

template <class T, int N>
struct Channels {
  static_assert(N == vector_size<T>);
  uint4 raw;

  // Zeros where not `valid`, without an access. `Changes`: the kernel also writes there.
  template <bool Changes = false>
  __device__ __forceinline__ static Channels load(const T* p, bool valid) {
    Channels c{make_uint4(0, 0, 0, 0)};
    auto* from = reinterpret_cast<const uint4*>(p);
    if (valid) c.raw = Changes ? *from : __ldg(from);
    return c;
  }

  __device__ __forceinline__ void widen_to(float (&x)[N]) const {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        x[i] = __uint_as_float(words[i]);
      } else if constexpr (std::is_same_v<T, __half>) {
        float2 two = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        x[2 * i] = two.x;
        x[2 * i + 1] = two.y;
      } else {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    }
  }

  // sum += factor · the channels
  __device__ __forceinline__ void add_to(float (&sum)[N], float factor) const {
    float x[N];
    widen_to(x);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += factor * x[i];
  }

  __device__ __forceinline__ static void store(T* p, const float (&x)[N]) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4)
        words[i] = __float_as_uint(x[i]);
      else
        words[i] = pair_of<T>(x[2 * i], x[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
  }
};

template <class T>
struct Channels<T, 1> {
  T raw;

  template <bool Changes = false>
  __device__ __forceinline__ static Channels load(const T* p, bool valid) {
    Channels c{narrow<T>(0.f)};
    if (valid) c.raw = Changes ? *p : __ldg(p);
    return c;
  }
  __device__ __forceinline__ void widen_to(float (&x)[1]) const { x[0] = widen(raw); }
  __device__ __forceinline__ void add_to(float (&sum)[1], float factor) const { sum[0] += factor * widen(raw); }
  __device__ __forceinline__ static void store(T* p, const float (&x)[1]) { *p = narrow<T>(x[0]); }
};

// --- groups: how a warp shares out rows of D channels ---

struct Groups {
  int lanes;  // of a row: a power of two
  int tiles;  // passes over the channels, where 32 lanes are too few
};

inline Groups groups_for(int channels, int vector) {
  int parts = (channels + vector - 1) / vector, lanes = 1;
  while (lanes < parts && lanes < 32) lanes *= 2;
  return {lanes, (parts + lanes - 1) / lanes};
}

// Whether rows of `channels` can be read as vectors from these pointers, null ones left out.
template <class T>
bool rows_are_vectors(int channels, std::initializer_list<const void*> pointers) {
  if (channels % vector_size<T>) return false;
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  return true;
}

// A count that a grid cannot have stays one, and the launch is refused.
inline unsigned blocks_for(int64_t items, int each) {
  int64_t blocks = (items + each - 1) / each;
  return blocks > 0x7fffffff ? 0xffffffffu : unsigned(blocks);
}

// --- positions ---

constexpr int max_levels = 16, level_bits = 4;

// A map of height × width pixels that begins at pixel `start` of a longer row of pixels.
struct Map {
  int height, width, start;
};

// One map known to the host, or several whose sizes only the device knows.
struct Maps {
  int levels, pixels;
  Map only;
  const int64_t* shapes;  // (levels, 2), height before width; null: `only`
  const int64_t* starts;  // (levels)
};

// The map at `level`; sizes and start are forced into [0, pixels], so that what a tensor holds cannot overflow.
__device__ __forceinline__ Map read_map(const Maps& maps, int level) {
  if (!maps.shapes) return maps.only;
  auto bound = [&](int64_t x) { return int(min(max(x, int64_t{0}), int64_t{maps.pixels})); };
  return {bound(__ldg(maps.shapes + 2 * level)), bound(__ldg(maps.shapes + 2 * level + 1)),
          bound(__ldg(maps.starts + level))};
}

// The four pixels around a position, from the top left: their rows in memory, -1 for those that count 0.
struct Corners {
  int4 at;
  float down, right;  // how far the position is below and right of the first
  bool near;          // false: NaN, infinite, or no corner is inside
  int anchor;         // the first corner, moved inside: where a transposed gather looks for the sample
};

__device__ __forceinline__ Corners corners_at(float y, float x, Map map, int pixels) {
  Corners c{make_int4(-1, -1, -1, -1), 0.f, 0.f, false, pixels};
  c.near = y >= -1.f && y < float(map.height) && x >= -1.f && x < float(map.width);
  if (!c.near) return c;
  float top = floorf(y), left = floorf(x);
  c.down = y - top;
  c.right = x - left;
  int row = int(top), column = int(left);
  auto pixel = [&](int i, int j) {
    int64_t at = int64_t{map.start} + int64_t{i} * map.width + j;
    return i >= 0 && i < map.height && j >= 0 && j < map.width && at < pixels ? int(at) : -1;
  };
  c.at = make_int4(pixel(row, column), pixel(row, column + 1), pixel(row + 1, column), pixel(row + 1, column + 1));
  int anchor = pixel(max(row, 0), max(column, 0));
  if (anchor >= 0) c.anchor = anchor;
  return c;
}

}  // namespace accel
