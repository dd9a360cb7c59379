// A stable sort of many segments by small keys: least significant digit first, 8 bits a pass, no atomics, so that the
// order of equal keys, and with it every sum made in that order, is always the same.
#pragma once

#include "launch.cuh"

#ifndef ACCEL_SORT_TILE  // a test sorts in short tiles
#define ACCEL_SORT_TILE 8192
#endif

namespace accel {

struct Pairs {  // (segments, length)
  uint32_t* keys;
  int* ids;
};

namespace sort {

constexpr int digits = 256, warps = 16, threads = 32 * warps, ahead = 4;
constexpr int tile_length = ACCEL_SORT_TILE, small = 2 * tile_length;  // up to `small` one tile: no count before
using Histogram = int[warps][digits + 1];         // the last is for lanes past the end

inline int tiles_of(int length) { return length <= small ? 1 : (length + tile_length - 1) / tile_length; }
inline int passes_for(uint32_t largest) { return largest >> 24 ? 4 : largest >> 16 ? 3 : largest >> 8 ? 2 : 1; }

// Calls visit(i, key, digit, peers) for the warp's share of [begin, end) in order, 32 at a time; `digit` of lanes past
// the end is `digits`, and `peers` are the lanes with the same digit.
template <class Visit>
__device__ __forceinline__ void each_in_order(const uint32_t* keys, int begin, int end, int shift, Visit visit) {
  int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int share = (end - begin + threads - 1) / threads * 32;
  int64_t first = int64_t{begin} + int64_t{warp} * share;
  int stop = int(min(first + share, int64_t{end}));
  for (int64_t at = first; at < stop; at += 32 * ahead) {
    uint32_t key[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) key[k] = at + 32 * k + lane < stop ? keys[at + 32 * k + lane] : 0;
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      int64_t i = at + 32 * k + lane;
      int digit = i < stop ? int(key[k] >> shift & (digits - 1)) : digits;
      unsigned peers = __match_any_sync(0xffffffffu, digit);
      visit(int(i), key[k], digit, peers);
      __syncwarp();  // the next 32 may have another first lane for the same digit
    }
  }
}

__device__ __forceinline__ void count_tile(const uint32_t* keys, int begin, int end, int shift, Histogram& counts) {
  int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  for (int i = lane; i <= digits; i += 32) counts[warp][i] = 0;
  __syncwarp();
  each_in_order(keys, begin, end, shift, [&](int, uint32_t, int digit, unsigned peers) {
    if (lane == __ffs(int(peers)) - 1) counts[warp][digit] += __popc(peers);
  });
  __syncthreads();
}

// totals: (segments, tiles, digits).
static __global__ void __launch_bounds__(threads) count(const uint32_t* keys, int length, int tiles, int shift, int* totals) {
  ACCEL_SHARED(int, counts, [warps][digits + 1]);
  int tile = int(blockIdx.x % unsigned(tiles));
  int64_t segment = blockIdx.x / unsigned(tiles);
  int begin = tile * tile_length, end = min(length, begin + tile_length);
  count_tile(keys + segment * length, begin, end, shift, counts);
  int digit = int(threadIdx.x);
  if (digit >= digits) return;
  int sum = 0;
  for (int w = 0; w < warps; ++w) sum += counts[w][digit];
  totals[(segment * tiles + tile) * digits + digit] = sum;
}

// The sum of the values of all threads with a smaller number, for the first `digits` threads.
__device__ __forceinline__ int sum_before(int value, int (&sums)[digits / 32]) {
  int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, sum = value;
  for (int by = 1; by < 32; by *= 2) {
    int other = __shfl_up_sync(0xffffffffu, sum, unsigned(by));
    if (lane >= by) sum += other;
  }
  if (lane == 31 && warp < digits / 32) sums[warp] = sum;
  __syncthreads();
  int before = sum - value;
  for (int w = 0; w < digits / 32; ++w)
    if (w < warp) before += sums[w];
  return before;
}

// Puts every pair of a tile in its place. Without `from.ids` the id is the position in the segment.
static __global__ void __launch_bounds__(threads)
    place(Pairs from, Pairs to, int length, int tiles, int shift, const int* totals) {
  ACCEL_SHARED(int, counts, [warps][digits + 1]);
  ACCEL_SHARED(int, sums, [digits / 32]);
  int tile = int(blockIdx.x % unsigned(tiles)), mine = int(threadIdx.x), lane = mine % 32, warp = mine / 32;
  int64_t segment = blockIdx.x / unsigned(tiles), first = segment * length;
  int begin = tiles == 1 ? 0 : tile * tile_length, end = tiles == 1 ? length : min(length, begin + tile_length);
  const uint32_t* keys = from.keys + first;
  count_tile(keys, begin, end, shift, counts);

  int total = 0, before = 0;  // of the digit `mine`: in the segment, in the tiles before
  if (mine < digits) {
    if (tiles == 1)
      for (int w = 0; w < warps; ++w) total += counts[w][mine];
    for (int t = 0; t < tiles && tiles > 1; ++t) {
      int in_tile = totals[(segment * tiles + t) * digits + mine];
      total += in_tile;
      if (t < tile) before += in_tile;
    }
  }
  int at = sum_before(total, sums) + before;
  if (mine < digits) {
    for (int w = 0; w < warps; ++w) {
      int here = counts[w][mine];
      counts[w][mine] = at;
      at += here;
    }
  }
  __syncthreads();
  each_in_order(keys, begin, end, shift, [&](int i, uint32_t key, int digit, unsigned peers) {
    int leader = __ffs(int(peers)) - 1, base = 0;
    if (lane == leader) {
      base = counts[warp][digit];
      counts[warp][digit] = base + __popc(peers);
    }
    base = __shfl_sync(0xffffffffu, base, leader);
    if (digit == digits) return;
    int64_t where = first + base + __popc(peers & ((1u << lane) - 1));
    to.keys[where] = key;
    to.ids[where] = from.ids ? from.ids[first + i] : i;
  });
}

}  // namespace sort

// Bytes that `sort_segments` needs for its counts.
inline int64_t sort_scratch(int segments, int length) {
  int tiles = sort::tiles_of(length);
  return tiles == 1 ? 0 : int64_t{segments} * tiles * sort::digits * 4;
}

// Sorts keys up to `largest`; the result is in `a`. The keys to be sorted stand where `sort_input` says.
inline uint32_t* sort_input(Pairs a, Pairs b, uint32_t largest) {
  return sort::passes_for(largest) % 2 ? b.keys : a.keys;
}

inline cudaError_t sort_segments(Pairs a, Pairs b, int segments, int length, uint32_t largest, int* counts,
                                 cudaStream_t stream) {
  int tiles = sort::tiles_of(length), passes = sort::passes_for(largest);
  dim3 grid(unsigned(segments) * unsigned(tiles)), block(sort::threads);
  Pairs from = passes % 2 ? b : a, to = passes % 2 ? a : b;
  from.ids = nullptr;
  for (int pass = 0; pass < passes; ++pass) {
    cudaError_t error = cudaSuccess;
    if (tiles > 1) error = launch(sort::count, grid, block, 0, stream, from.keys, length, tiles, 8 * pass, counts);
    if (error == cudaSuccess)
      error = launch(sort::place, grid, block, 0, stream, from, to, length, tiles, 8 * pass, counts);
    if (error != cudaSuccess) return error;
    from = to;
    to = to.keys == a.keys ? b : a;
  }
  return cudaSuccess;
}

}  // namespace accel
