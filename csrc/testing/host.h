// CUDA on the host, for tests: what a .cu file of this project uses, for a plain C++ compiler. README.md explains it.
#pragma once

#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)

#define threadIdx (::accel::host::here->thread)
#define blockIdx (::accel::host::here->block)
#define blockDim (::accel::host::block_size)
#define gridDim (::accel::host::grid_size)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#include "half.h"
#include "warp.h"

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline void __threadfence() {}

// Relaxed, as on the device: an atomic orders nothing but itself.
template <class T, class F>
T accel_host_update(T* p, F next) {
  accel::host::maybe_yield();
  T old, fresh;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    fresh = next(old);
  } while (!__atomic_compare_exchange(p, &old, &fresh, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> x) {
  return accel_host_update(p, [x](T old) { return T(old + x); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> x) {
  return accel_host_update(p, [x](T old) { return max(old, x); });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> x) {
  return accel_host_update(p, [x](T old) { return min(old, x); });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> x) {
  return accel_host_update(p, [x](T) { return x; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  return accel_host_update(p, [=](T old) { return old == expected ? x : old; });
}

#define ACCEL_SHARED(type, name, dims)                                                            \
  static char accel_key_##name;                                                                   \
  using accel_type_##name = type dims;                                                            \
  auto& name = *static_cast<accel_type_##name*>(::accel::host::shared_array(                      \
      &accel_key_##name, #name, sizeof(accel_type_##name), ::accel::host::Site::current()))

#define ACCEL_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::accel::host::dynamic_shared())

namespace accel {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t, A... arguments) {
  std::tuple<std::remove_const_t<P>...> given(arguments...);
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::remove_const_t<P>...>* given;
  } call{kernel, &given};
  auto body = [](void* context) {
    auto* c = static_cast<Call*>(context);
    std::apply(c->kernel, *c->given);
  };
  return cudaError_t(host::run_grid(grid, block, shared, body, &call));
}

}  // namespace accel
