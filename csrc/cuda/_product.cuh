// Products on the tensor cores whose left side a warp makes in registers and whose right side lies in shared memory:
// wgmma where the architecture has it (sm_90a), else mma.sync. Both take the same memory and the same registers.
//
// A step is 64 deep. A block of the right side, b (64 × 128), lies column by column in rows of 128 bytes, the 16-byte
// parts of row n exchanged by n % 8: the 128-byte swizzle of wgmma, and free of bank conflicts for mma.sync. A block
// begins at a multiple of 1024 bytes.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace accel::product {

constexpr int depth = 64, columns = 128, block = depth * columns;  // elements of two bytes

// Element of a block's memory where part `part` (8 deep) of column `n` begins.
__host__ __device__ constexpr int place(int n, int part) { return n * depth + (part ^ (n & 7)) * 8; }

// wgmma's swizzle as the manual has it: of an address in bytes, bits 4 to 6 are exchanged by bits 7 to 9.
constexpr bool place_is_the_swizzle() {
  for (int n = 0; n < columns; ++n)
    for (int part = 0; part < depth / 8; ++part) {
      int plain = 2 * depth * n + 16 * part;
      if (2 * place(n, part) != (plain ^ (plain >> 3 & 0x70))) return false;
    }
  return true;
}
static_assert(place_is_the_swizzle());

// Of a warp, 16 rows and 128 columns: lane 4·g + t holds [j][e] at column 8·j + 2·t + e % 2 of row g, or g + 8 from
// e = 2 on. Of a: a[0] row g, a[1] row g + 8, both 2·t and 2·t + 1 deep, a[2] and a[3] likewise 8 deeper.
using Sum = float[columns / 8][4];

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Orders what this thread wrote to shared memory before what wgmma reads after the next barrier.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product after registers of `sum` or `a` were written.
__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int groups_left>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups_left) : "memory");
}

// What reads `sum` next comes after the wait before this.
__device__ __forceinline__ void settle(Sum& sum) {
#pragma unroll
  for (int j = 0; j < columns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sum[j][e])::"memory");
}

__device__ __forceinline__ uint64_t describe(const void* b) {
  uint64_t at = uint32_t(__cvta_generic_to_shared(b));
  return (at & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define ACCEL_WGMMA(type)                                                                                         \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                    \
  " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"   \
  "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"   \
  "%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
#define ACCEL_FOUR(j) "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])
#define ACCEL_SUM                                                                                                   \
  ACCEL_FOUR(0), ACCEL_FOUR(1), ACCEL_FOUR(2), ACCEL_FOUR(3), ACCEL_FOUR(4), ACCEL_FOUR(5), ACCEL_FOUR(6),          \
      ACCEL_FOUR(7), ACCEL_FOUR(8), ACCEL_FOUR(9), ACCEL_FOUR(10), ACCEL_FOUR(11), ACCEL_FOUR(12), ACCEL_FOUR(13), \
      ACCEL_FOUR(14), ACCEL_FOUR(15)

// sum += a · the 16 rows of b from 16·k on. All four warps of a warpgroup call it, each with its own 16 rows of a; the
// registers stay in use until the group is waited for.
template <class T>
__device__ __forceinline__ void add(Sum& sum, const uint32_t (&a)[4], const T* b, int k) {
  uint64_t from = describe(b) + uint64_t(2 * k);  // 32 bytes
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(ACCEL_WGMMA("f16") : ACCEL_SUM : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(from));
  else
    asm volatile(ACCEL_WGMMA("bf16") : ACCEL_SUM : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(from));
}

#undef ACCEL_SUM
#undef ACCEL_FOUR
#undef ACCEL_WGMMA

#else

__device__ __forceinline__ void publish() {}
__device__ __forceinline__ void begin() {}
__device__ __forceinline__ void commit() {}
template <int groups_left>
__device__ __forceinline__ void wait() {}
__device__ __forceinline__ void settle(Sum&) {}

template <class T>
__device__ __forceinline__ void add(Sum& sum, const uint32_t (&a)[4], const T* b, int k) {
  int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < columns / 8; ++j) {
    int n = 8 * j + g;
    uint32_t of_b[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) of_b[h] = *reinterpret_cast<const uint32_t*>(b + place(n, 2 * k + h) + 2 * t);
    mma_m16n8k16<T>(sum[j], a, of_b);
  }
}

#endif

}  // namespace accel::product
