// What kernels that weigh pairs of queries and keys are told alike: plain pointers and sizes, no torch type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/_dtype.h"

namespace accel::pairs {

// (B, H, tokens, size) with any strides, in elements, and the last axis contiguous.
struct Strided {
  void* data;
  int64_t batch, head, token;
};

// A run of queries handled together, and which keys its rows see: between `first` and `end` some row does, between
// `all_first` and `all_end` every row, in each of the two intervals.
struct Tile {
  int query, count;
  bool starts;  // a document
  int first[2], end[2], all_first[2], all_end[2];
};

// Floats around a line, so that the vectors of a tile may read past its ends.
constexpr int LINE_MARGIN = 128;
constexpr int TILE_ROWS = 64;  // at most that many queries a tile
constexpr int BLOCK_KEYS = 256;

// x in the unit of logits. What is finite stays so: the least number of fp32, which masks add, times log2(e) is not, and
// −∞ hides a key. Static, so that no level of the kernels runs the code of another.
[[maybe_unused]] static float in_unit(float x, float unit) {
  constexpr float LEAST = std::numeric_limits<float>::lowest();
  return std::max(x * unit, std::min(x, LEAST));
}

struct PairParams {
  int64_t batch, heads, kv_heads, queries, keys;  // B, Hq, Hkv, T, S
  int head_dim, value_dim;                        // D, E
  Dtype dtype;
  float scale, softcap;  // softcap 0: none
  float unit;            // what logits are multiplied by: log2(e) where a power of two follows
  Strided q, k, v;
  const float* bias;  // dense, strides 0 along axes it is broadcast over; null if none
  int64_t bias_stride[4];
  const uint8_t* mask;
  int64_t mask_stride[4];
  // Logits of a distance, in `unit` unless a softcap comes before: line[h][i − j], turned round so that keys read it
  // forwards; query i finds key j at line + h · line_stride + line_length − 1 − shift_i + j.
  const float* line;
  int64_t line_length, line_stride;
  const float* table;  // (Hq, R) in the same units, rows turned round where there is a grid
  int64_t table_rows;
  const void* index;     // (T, S) int32, or int64 where wide_index; null: the grid
  bool wide_index;
  int64_t grid[3];       // 1, h, w behind `extra` tokens
  int64_t extra;
  const int32_t* rows;  // (B or 1, T, 5), or null
  int64_t rows_batch;   // stride
  const Tile* tiles;  // (B or 1, tile_count)
  int64_t tile_count, tiles_batch;
  int tile_rows;  // that no tile has more of
  bool dropout;
  uint64_t seed, drop_below;
  float keep_scale;
  // A forward task: tiles [edge, next edge) of the query heads of one kv head, one head after the other.
  const int* chunk_edges;
  int64_t chunks, chunk_tiles;  // and the most tiles of one
};

// The sums of a backward over pairs. A task is a run of batch entries, a run of kv heads and a run of keys. All follow
// from shapes alone, so that sums have the same order whatever the number of threads.
struct PairSums {
  float* grad_bias;  // zeroed, in the shape of bias, or null
  int64_t grad_bias_stride[4];
  int64_t batch_runs, head_runs, key_runs;
  int64_t keys_per_run;  // a multiple of BLOCK_KEYS
  float* part_q;         // (key_runs, B, Hq, T, D) where key_runs > 1
  float* part_line;      // (batch_runs · key_runs, Hq, line_length) turned round as line is, or null
  float* part_table;     // (batch_runs · key_runs, Hq, table_rows) as table is, or null
};

}  // namespace accel::pairs
