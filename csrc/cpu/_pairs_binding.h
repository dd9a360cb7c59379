// From torch tensors to what kernels that weigh pairs are told: checks, tiles of queries, runs of keys. Every argument has
// the form that accel/ops/pairs.py gives it, which is the place where they are defined.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/_binding.h"
#include "cpu/_pairs.h"

namespace accel::pairs {

// Everything a call needs besides its tensors: what the parameters point into.
struct Call {
  PairParams p{};
  std::vector<Tile> tiles;
  bool jumps = false;  // several documents
  std::vector<Tensor> keep;
  std::vector<float> line, table;
};

inline Strided strided(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, name, " must be a 4-D CPU tensor");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, name, " must have a contiguous last axis");
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// Strides of a tensor that broadcasts to (B, Hq, T, S): 0 along axes of size 1.
inline void broadcast_strides(const PairParams& p, const Tensor& x, const char* name, int64_t* strides) {
  const int64_t full[4] = {p.batch, p.heads, p.queries, p.keys};
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, name, " must be a 4-D CPU tensor");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x.size(i) == full[i] || x.size(i) == 1, name, " must broadcast to (B, Hq, T, S)");
    strides[i] = x.size(i) == 1 ? 0 : x.stride(i);
  }
}

// A tile reads its line for all its rows and all keys that one of them sees, in whole vectors.
inline void check_line(const PairParams& p, int64_t b, const Tile& tile) {
  if (!p.line || !p.rows) return;
  constexpr int SLACK = LINE_MARGIN - 16;
  const int64_t shift = p.rows[b * p.rows_batch + int64_t(tile.query) * 5 + 4];
  const int first = std::min(tile.first[0], tile.first[1]), end = std::max(tile.end[0], tile.end[1]);
  STD_TORCH_CHECK(first >= end || (shift - (end - 1) >= -SLACK && shift + tile.count - 1 - first < p.line_length + SLACK),
                  "rows: keys [", first, ", ", end, ") of the queries from ", tile.query, " on leave the line");
}

// Runs of at most `most` queries, with what all of their rows see and what some do.
inline std::vector<Tile> tiles_of(const PairParams& p, int64_t batches, const std::vector<int>& edges, int most) {
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < batches; ++b)
    for (size_t n = 0; n + 1 < edges.size(); ++n) {
      const int length = edges[n + 1] - edges[n], count = (length + most - 1) / most;
      for (int t = 0, at = edges[n]; t < count; ++t) {
        Tile tile{};
        tile.query = at;
        tile.starts = t == 0;
        tile.count = (edges[n + 1] - at) / (count - t);
        at += tile.count;
        for (int i = 0; i < 2; ++i) {
          tile.first[i] = int(p.keys), tile.all_end[i] = int(p.keys);
          for (int row = tile.query; row < at; ++row) {
            const int32_t whole[4] = {0, int32_t(p.keys), 0, 0};
            const int32_t* r = p.rows ? p.rows + b * p.rows_batch + int64_t(row) * 5 : whole;
            const int first = r[2 * i], end = r[2 * i + 1];
            if (first < end) tile.first[i] = std::min(tile.first[i], first), tile.end[i] = std::max(tile.end[i], end);
            tile.all_first[i] = std::max(tile.all_first[i], first);
            tile.all_end[i] = std::min(tile.all_end[i], end);
            if (first >= end) tile.all_end[i] = -1;
          }
        }
        check_line(p, b, tile);
        tiles.push_back(tile);
      }
    }
  return tiles;
}

inline int64_t pairs_of(const std::vector<Tile>& tiles) {
  int64_t pairs = 0;
  for (const Tile& tile : tiles)
    for (int i = 0; i < 2; ++i) pairs += int64_t(tile.count) * std::max(tile.end[i] - tile.first[i], 0);
  return pairs;
}

// Tiles end where a query's place in the line jumps: a new document. Half as many rows a tile cost a little, and are
// taken where rules leave that much less to compute, as narrow windows do.
inline void cut_tiles(Call& call, int64_t batches) {
  PairParams& p = call.p;
  std::vector<int> edges{0};
  for (int64_t i = 1; p.rows && i < p.queries; ++i)
    if (p.rows[i * 5 + 4] != p.rows[(i - 1) * 5 + 4] + 1) edges.push_back(int(i));
  edges.push_back(int(p.queries));
  call.jumps = edges.size() > 2;
  p.tile_rows = TILE_ROWS;
  call.tiles = tiles_of(p, batches, edges, TILE_ROWS);
  if (p.rows && p.queries > TILE_ROWS) {
    std::vector<Tile> halves = tiles_of(p, batches, edges, TILE_ROWS / 2);
    if (double(pairs_of(halves)) < 0.94 * double(pairs_of(call.tiles))) {
      call.tiles = std::move(halves);
      p.tile_rows = TILE_ROWS / 2;
    }
  }
  p.tile_count = int64_t(call.tiles.size()) / std::max<int64_t>(batches, 1);
  p.tiles_batch = batches > 1 ? p.tile_count : 0;
  p.tiles = call.tiles.data();
}

inline void check_rows(const PairParams& p, int64_t batches) {
  for (int64_t n = 0; n < batches * p.queries; ++n) {
    const int32_t* r = p.rows + n * 5;
    for (int i = 0; i < 2; ++i) {
      const int first = r[2 * i], end = r[2 * i + 1];
      STD_TORCH_CHECK(0 <= first && first <= end && end <= p.keys, "rows: keys [", first, ", ", end, ") of ", p.keys);
    }
  }
}

// Columns (heads) of a bias times the unit of logits, each turned round if asked, with `margin` floats around.
inline std::vector<float> columns(const float* from, int64_t heads, int64_t length, int64_t head_stride, int64_t stride,
                           bool turned, int64_t margin, float unit) {
  std::vector<float> out(size_t(heads * (length + 2 * margin)), 0.0f);
  for (int64_t h = 0; h < heads; ++h) {
    float* dst = out.data() + h * (length + 2 * margin) + margin;
    const float* src = from + h * head_stride;
    for (int64_t n = 0; n < length; ++n) dst[turned ? length - 1 - n : n] = in_unit(src[n * stride], unit);
  }
  return out;
}

// Whether an index is negative or not below `rows`: then its sign bit is set, or that of what is left to the last row.
template <typename Int>
bool reaches_outside(const Int* index, int64_t count, int64_t rows) {
  using Bits = std::make_unsigned_t<Int>;
  std::atomic<bool> outside{rows > std::numeric_limits<int32_t>::max()};
  torch::stable::parallel_for(0, count, 1 << 16, [&](int64_t from, int64_t to) {
    Bits signs = 0;
    for (int64_t n = from; n < to; ++n) signs |= Bits(index[n]) | (Bits(rows - 1) - Bits(index[n]));
    if (signs >> (8 * sizeof(Int) - 1)) outside = true;
  });
  return outside;
}

inline void describe_biases(Call& call, const OptionalTensor& bias, const OptionalTensor& line, const OptionalTensor& table,
                     const OptionalTensor& index, const Ints& grid) {
  PairParams& p = call.p;
  const float unit = p.softcap > 0.0f ? 1.0f : p.unit;
  if (bias) {
    call.keep.push_back(bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float));
    const Tensor& x = call.keep.back();
    broadcast_strides(p, x, "bias", p.bias_stride);
    p.bias = static_cast<const float*>(x.const_data_ptr());
  }
  if (line) {
    STD_TORCH_CHECK(line->dim() == 2 && line->size(0) == p.heads && line->size(1) > 0 &&
                        line->scalar_type() == ScalarType::Float && line->is_cpu(),
                    "line must be (Hq, L) float32");
    STD_TORCH_CHECK(p.rows || line->size(1) >= p.queries + p.keys - 1, "line must have at least T + S - 1 elements");
    p.line_length = line->size(1);
    p.line_stride = p.line_length + 2 * LINE_MARGIN;
    call.line = columns(static_cast<const float*>(line->const_data_ptr()), p.heads, p.line_length, line->stride(0),
                        line->stride(1), true, LINE_MARGIN, unit);
    p.line = call.line.data() + LINE_MARGIN;
  }
  if (!table) return;
  check_f32(table, "bias_table", table->numel());
  STD_TORCH_CHECK(table->dim() == 2 && table->size(1) == p.heads, "bias_table must be (R, Hq)");
  p.table_rows = table->size(0);
  call.table = columns(static_cast<const float*>(table->const_data_ptr()), p.heads, p.table_rows, 1, p.heads, !index, 0,
                       unit);
  p.table = call.table.data();
  if (index) {
    check_cpu(*index, "bias_index");
    p.wide_index = index->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK((p.wide_index || index->scalar_type() == ScalarType::Int) && index->numel() == p.queries * p.keys,
                    "bias_index must be (T, S) int32 or int64");
    p.index = index->const_data_ptr();
    const bool outside = p.wide_index ? reaches_outside(static_cast<const int64_t*>(p.index), index->numel(), p.table_rows)
                                      : reaches_outside(static_cast<const int32_t*>(p.index), index->numel(), p.table_rows);
    STD_TORCH_CHECK(!outside, "bias_index reaches outside of a table of ", p.table_rows, " rows");
    return;
  }
  STD_TORCH_CHECK(grid.size() == 3 && grid[0] > 0 && grid[1] > 0 && grid[2] >= 0, "bias_table needs an index or a grid");
  p.grid[0] = 1, p.grid[1] = grid[0], p.grid[2] = grid[1], p.extra = grid[2];
  const int64_t tokens = grid[0] * grid[1] + p.extra, rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + (p.extra ? 3 : 0);
  STD_TORCH_CHECK(tokens == p.queries && tokens == p.keys && rows == p.table_rows, "the grid does not fit the table");
}

inline Call describe(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias, const OptionalTensor& line,
              const OptionalTensor& table, const OptionalTensor& mask,
              const OptionalTensor& index, const OptionalTensor& rows, const OptionalTensor& seed, const Ints& grid,
              double scale, double softcap, double dropout_p, float unit, const char* who) {
  Call call;
  PairParams& p = call.p;
  p.q = strided(q, "q"), p.k = strided(k, "k"), p.v = strided(v, "v");
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.keys = k.size(2), p.kv_heads = k.size(1);
  p.head_dim = int(q.size(3)), p.value_dim = int(v.size(3));
  p.dtype = dtype_of(q, who);
  STD_TORCH_CHECK(k.size(0) == p.batch && v.size(0) == p.batch && v.size(1) == p.kv_heads && v.size(2) == p.keys &&
                      k.size(3) == p.head_dim && p.kv_heads > 0 && p.heads % p.kv_heads == 0,
                  "q, k and v do not fit");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k, v differ in dtype");
  STD_TORCH_CHECK(p.queries < (1 << 30) && p.keys < (1 << 30), "too many tokens");
  p.scale = float(scale), p.softcap = float(softcap), p.unit = unit;
  int64_t batches = 1;
  if (rows) {
    check_cpu(*rows, "rows");
    STD_TORCH_CHECK(rows->dim() == 3 && rows->size(1) == p.queries && rows->size(2) == 5 &&
                        (rows->size(0) == 1 || rows->size(0) == p.batch) && rows->scalar_type() == ScalarType::Int,
                    "rows must be (B or 1, T, 5) int32");
    batches = rows->size(0);
    p.rows = static_cast<const int32_t*>(rows->const_data_ptr());
    p.rows_batch = batches > 1 ? p.queries * 5 : 0;
  }
  describe_biases(call, bias, line, table, index, grid);
  if (p.rows) check_rows(p, batches);
  cut_tiles(call, batches);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be boolean");
    broadcast_strides(p, *mask, "mask", p.mask_stride);
    p.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  p.dropout = dropout_p > 0.0;
  if (p.dropout) {
    STD_TORCH_CHECK(seed && dropout_p < 1.0, "dropout needs a seed and a probability below 1");
    check_cpu(*seed, "seed");
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed must be one int64");
    p.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
    p.drop_below = uint64_t(dropout_p * 4294967296.0);
    p.keep_scale = float(1.0 / (1.0 - dropout_p));
  }
  return call;
}

// Memory for (B, H, T, ·) in the order of `like`: heads inside tokens where it has them so.
inline Tensor allocate(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens, int64_t size) {
  if (heads > 1 && like.stride(1) < like.stride(2))
    return torch::stable::transpose(torch::stable::new_empty(like, {batch, tokens, heads, size}), 1, 2);
  return torch::stable::new_empty(like, {batch, heads, tokens, size});
}

// Runs of tiles of even length; a document of a packed batch has its own, which then begins with its first key.
inline std::vector<int> cut_chunks(Call& call, int64_t rows) {
  PairParams& p = call.p;
  const int64_t most = std::max<int64_t>(rows / p.tile_rows, 1), tiles = p.tile_count;
  std::vector<int> ends;  // of runs that belong together, in tiles
  if (tiles && call.jumps) {
    for (int64_t n = 1; n <= p.heads / p.kv_heads * tiles; ++n)
      if (n % tiles == 0 || call.tiles[size_t(n % tiles)].starts) ends.push_back(int(n));
  } else {
    ends.push_back(int(p.heads / p.kv_heads * tiles));
  }
  std::vector<int> edges{0};
  p.chunk_tiles = 0;
  for (int end : ends) {
    const int64_t length = end - edges.back(), count = (length + most - 1) / most;
    for (int64_t c = count; c > 0; --c) {
      const int64_t size = (end - edges.back() + c - 1) / c;
      edges.push_back(edges.back() + int(size));
      p.chunk_tiles = std::max(p.chunk_tiles, size);
    }
  }
  return edges;
}

// One owner for every sum: what is broadcast over an axis makes one task of that axis. Runs of keys, and runs of the
// batch where each needs a bias gradient of its own, are as many as keep a few dozen workers busy, and no more.
inline void split(PairSums& b, const PairParams& p, bool partial_bias, const OptionalTensor& bias, bool want_bias,
           int64_t shortest_run) {
  constexpr int64_t TASKS = 16;
  const bool one_batch = want_bias && bias->size(0) == 1, one_head = want_bias && bias->size(1) == 1;
  const bool one_key = want_bias && bias->size(3) == 1;
  b.head_runs = one_head ? 1 : p.kv_heads;
  b.batch_runs = one_batch ? 1 : partial_bias ? std::clamp<int64_t>(2 * TASKS / b.head_runs, 1, p.batch) : p.batch;
  const int64_t wanted = one_key ? 1 : (TASKS + b.batch_runs * b.head_runs - 1) / (b.batch_runs * b.head_runs);
  const int64_t shortest = one_head || one_batch ? BLOCK_KEYS : shortest_run;
  const int64_t runs = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(p.keys / shortest, 1));
  const int64_t keys = std::max<int64_t>((p.keys + runs - 1) / runs, 1);
  b.keys_per_run = (keys + BLOCK_KEYS - 1) / BLOCK_KEYS * BLOCK_KEYS;
  b.key_runs = std::max<int64_t>((p.keys + b.keys_per_run - 1) / b.keys_per_run, 1);
}

// to[i·step] (turned round if asked) = Σ over parts, in their order.
inline void reduce(const float* from, int64_t parts, int64_t part_stride, int64_t length, float* to, int64_t step, bool turned) {
  for (int64_t i = 0; i < length; ++i) {
    float sum = from[i];
    for (int64_t c = 1; c < parts; ++c) sum += from[c * part_stride + i];
    to[(turned ? length - 1 - i : i) * step] = sum;
  }
}

// Memory of a backward's sums over pairs, and the gradients made of them.
struct SumTensors {
  Tensor bias, part_q, part_line, part_table;
};

inline SumTensors allocate_sums(PairSums& b, const PairParams& p, const Tensor& q, const OptionalTensor& bias,
                                bool want_bias, bool want_line, bool want_table) {
  auto floats = [&](bool wanted, Ints shape) {
    if (!wanted) shape = {0};
    return torch::stable::new_empty(q, shape, ScalarType::Float);
  };
  Ints bias_shape(4);
  for (int i = 0; i < 4 && want_bias; ++i) bias_shape[size_t(i)] = bias->size(i);
  const int64_t parts = b.batch_runs * b.key_runs;
  SumTensors sums{floats(want_bias, bias_shape),
                  floats(b.key_runs > 1, {b.key_runs, p.batch * p.heads * p.queries * p.head_dim}),
                  floats(want_line, {parts, p.heads, p.line_length}),
                  floats(want_table, {parts, p.heads, p.table_rows})};
  if (want_bias) {
    torch::stable::zero_(sums.bias);
    b.grad_bias = mutable_floats(sums.bias);
    broadcast_strides(p, sums.bias, "grad_bias", b.grad_bias_stride);
  }
  b.part_q = b.key_runs > 1 ? mutable_floats(sums.part_q) : nullptr;
  b.part_line = want_line ? mutable_floats(sums.part_line) : nullptr;
  b.part_table = want_table ? mutable_floats(sums.part_table) : nullptr;
  return sums;
}

// The gradients of line and table, empty where they were not asked for.
inline std::pair<Tensor, Tensor> small_gradients(const PairSums& b, const PairParams& p, const Tensor& q) {
  const int64_t parts = b.batch_runs * b.key_runs;
  Tensor line = torch::stable::new_empty(q, b.part_line ? Ints{p.heads, p.line_length} : Ints{0}, ScalarType::Float);
  Tensor table = torch::stable::new_empty(q, b.part_table ? Ints{p.table_rows, p.heads} : Ints{0}, ScalarType::Float);
  for (int64_t h = 0; h < p.heads; ++h) {
    if (b.part_line)
      reduce(b.part_line + h * p.line_length, parts, p.heads * p.line_length, p.line_length,
             mutable_floats(line) + h * p.line_length, 1, true);
    if (b.part_table)
      reduce(b.part_table + h * p.table_rows, parts, p.heads * p.table_rows, p.table_rows, mutable_floats(table) + h,
             p.heads, !p.index);
  }
  return {line, table};
}

}  // namespace accel::pairs
