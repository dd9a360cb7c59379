// Collectives: barriers, shuffles, votes, matrix fragments; and asynchronous copies. Each takes the place of its call
// as a hidden argument, by which threads at different places are told apart.
#pragma once

#include "runtime.h"

#define ACCEL_AT const ::accel::host::Site &at = ::accel::host::Site::current()
// A Resolve runs in the scheduler and reads stacks of many fibres, none of which runs.
#define ACCEL_UNWATCHED __attribute__((no_sanitize("thread")))

inline void __syncthreads(ACCEL_AT) {
  accel::host::block_barrier("__syncthreads", accel::host::Vote::none, 0, at);
}
inline int __syncthreads_or(int predicate, ACCEL_AT) {
  return accel::host::block_barrier("__syncthreads_or", accel::host::Vote::any, predicate, at);
}
inline int __syncthreads_and(int predicate, ACCEL_AT) {
  return accel::host::block_barrier("__syncthreads_and", accel::host::Vote::all, predicate, at);
}
inline int __syncthreads_count(int predicate, ACCEL_AT) {
  return accel::host::block_barrier("__syncthreads_count", accel::host::Vote::count, predicate, at);
}
inline void __syncwarp(unsigned mask = 0xffffffff, ACCEL_AT) {
  accel::host::warp_collective("__syncwarp", mask, true, nullptr, nullptr, nullptr, at);
}

namespace accel::host {

template <class T>
struct Sent {
  T value;
  int from;  // the lane whose value is wanted
};

template <class T>
ACCEL_UNWATCHED void resolve_shuffle(unsigned mask, const void* const* in, void* const* out) {
  for (int i = 0; i < 32; ++i) {
    if (!in[i]) continue;
    int from = static_cast<const Sent<T>*>(in[i])->from;
    if (!in[from]) return fail_lane(i, "reads from lane %d, which mask 0x%08x does not name", from, mask);
    *static_cast<T*>(out[i]) = static_cast<const Sent<T>*>(in[from])->value;
  }
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int from, int width, const Site& at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (width < 1 || width > 32 || (width & (width - 1))) fail(name, at, "width %d is no power of two up to 32", width);
  Sent<T> sent{value, from};
  T result{};
  warp_collective(name, mask, false, resolve_shuffle<T>, &sent, &result, at);
  return result;
}

enum class Ballot { bits, any, all };

template <Ballot kind>
ACCEL_UNWATCHED void resolve_vote(unsigned mask, const void* const* in, void* const* out) {
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i)
    if (in[i] && *static_cast<const int*>(in[i])) bits |= 1u << i;
  unsigned verdict = kind == Ballot::bits ? bits : kind == Ballot::any ? bits != 0 : bits == mask;
  for (int i = 0; i < 32; ++i)
    if (out[i]) *static_cast<unsigned*>(out[i]) = verdict;
}

template <Ballot kind>
unsigned vote(const char* name, unsigned mask, int predicate, const Site& at) {
  unsigned result = 0;
  warp_collective(name, mask, false, resolve_vote<kind>, &predicate, &result, at);
  return result;
}

template <class T>
ACCEL_UNWATCHED void resolve_match(unsigned, const void* const* in, void* const* out) {
  for (int i = 0; i < 32; ++i) {
    if (!in[i]) continue;
    unsigned same = 0;
    for (int j = 0; j < 32; ++j)
      if (in[j] && *static_cast<const T*>(in[j]) == *static_cast<const T*>(in[i])) same |= 1u << j;
    *static_cast<unsigned*>(out[i]) = same;
  }
}

}  // namespace accel::host

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, ACCEL_AT) {
  int lane = accel::host::here->lane, base = lane & ~(width - 1);
  return accel::host::shuffle("__shfl_sync", mask, value, base + (from & (width - 1)), width, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, ACCEL_AT) {
  int lane = accel::host::here->lane, end = (lane & ~(width - 1)) + width, from = lane ^ bits;
  return accel::host::shuffle("__shfl_xor_sync", mask, value, from < end ? from & 31 : lane, width, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, ACCEL_AT) {
  int lane = accel::host::here->lane, end = (lane & ~(width - 1)) + width, from = lane + int(by);
  return accel::host::shuffle("__shfl_down_sync", mask, value, from < end ? from : lane, width, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, ACCEL_AT) {
  int lane = accel::host::here->lane, base = lane & ~(width - 1), from = lane - int(by);
  return accel::host::shuffle("__shfl_up_sync", mask, value, from >= base ? from : lane, width, at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, ACCEL_AT) {
  return accel::host::vote<accel::host::Ballot::bits>("__ballot_sync", mask, predicate, at);
}
inline int __any_sync(unsigned mask, int predicate, ACCEL_AT) {
  return int(accel::host::vote<accel::host::Ballot::any>("__any_sync", mask, predicate, at));
}
inline int __all_sync(unsigned mask, int predicate, ACCEL_AT) {
  return int(accel::host::vote<accel::host::Ballot::all>("__all_sync", mask, predicate, at));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, ACCEL_AT) {
  unsigned result = 0;
  accel::host::warp_collective("__match_any_sync", mask, false, accel::host::resolve_match<T>, &value, &result, at);
  return result;
}

namespace accel {
namespace host {

struct Fragments {
  const uint32_t *a, *b;
  float* d;
};

inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float widen(__half x) { return __half2float(x); }

// d (16 × 8) += a (16 × 16) · b (16 × 8). Lane 4·g + t holds of a rows g and g+8 at columns 2t, 2t+1, 2t+8, 2t+9; of b
// the same rows 2t... of column g; of d rows g and g+8 at columns 2t, 2t+1.
template <class T>
ACCEL_UNWATCHED void resolve_mma(unsigned, const void* const* in, void* const*) {
  float a[16][16], b[16][8];
  auto half = [](uint32_t pair, int i) { return widen(T{uint16_t(pair >> (16 * i))}); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto* f = static_cast<const Fragments*>(in[lane]);
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r & 1)][2 * t + i + 8 * (r >> 1)] = half(f->a[r], i);
      for (int r = 0; r < 2; ++r) b[2 * t + i + 8 * r][g] = half(f->b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* f = static_cast<const Fragments*>(in[lane]);
    for (int r = 0; r < 4; ++r) {
      int row = lane / 4 + 8 * (r >> 1), column = 2 * (lane % 4) + (r & 1);
      float sum = f->d[r];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      f->d[r] = sum;
    }
  }
}

inline void copy16(void* to, const void* from) { *static_cast<uint4*>(to) = *static_cast<const uint4*>(from); }
inline void zero16(void* to, const void*) { *static_cast<uint4*>(to) = uint4{}; }

}  // namespace host

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ACCEL_AT) {
  host::Fragments fragments{a, b, d};
  host::warp_collective("mma_m16n8k16", 0xffffffff, false, host::resolve_mma<T>, &fragments, &fragments, at);
}

inline void cp_async16(void* to, const void* from, bool valid = true, ACCEL_AT) {
  host::async_copy(valid ? host::copy16 : host::zero16, to, from, at);
}
inline void cp_async_commit() { host::async_commit(); }
template <int groups_left>
void cp_async_wait() {
  host::async_wait(groups_left);
}

}  // namespace accel
