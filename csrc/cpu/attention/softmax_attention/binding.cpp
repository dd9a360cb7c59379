// torch ops accel_native::softmax_attention_{forward,backward}: checks, allocation, threads. Every argument has the
// form that accel/ops/attention/softmax_attention.py gives it, which is the only caller and the place where the op is defined.

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/_binding.h"
#include "params.h"

namespace accel::softmax_attention {
namespace {

constexpr double LOG2_E = 1.4426950408889634;

// Everything a call needs besides its tensors: what the parameters point into.
struct Call {
  Params p{};
  std::vector<Tile> tiles;
  bool jumps = false;  // several documents
  std::vector<Tensor> keep;
  std::vector<float> line, table;
};

Strided strided(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, name, " must be a 4-D CPU tensor");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, name, " must have a contiguous last axis");
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// Strides of a tensor that broadcasts to (B, Hq, T, S): 0 along axes of size 1.
void broadcast_strides(const Params& p, const Tensor& x, const char* name, int64_t* strides) {
  const int64_t full[4] = {p.batch, p.heads, p.queries, p.keys};
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, name, " must be a 4-D CPU tensor");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x.size(i) == full[i] || x.size(i) == 1, name, " must broadcast to (B, Hq, T, S)");
    strides[i] = x.size(i) == 1 ? 0 : x.stride(i);
  }
}

// A tile reads its line for all its rows and all keys that one of them sees, in whole vectors.
void check_line(const Params& p, int64_t b, const Tile& tile) {
  if (!p.line || !p.rows) return;
  constexpr int SLACK = LINE_MARGIN - 16;
  const int64_t shift = p.rows[b * p.rows_batch + int64_t(tile.query) * 5 + 4];
  const int first = std::min(tile.first[0], tile.first[1]), end = std::max(tile.end[0], tile.end[1]);
  STD_TORCH_CHECK(first >= end || (shift - (end - 1) >= -SLACK && shift + tile.count - 1 - first < p.line_length + SLACK),
                  "rows: keys [", first, ", ", end, ") of the queries from ", tile.query, " on leave the line");
}

// Runs of at most `most` queries, with what all of their rows see and what some do.
std::vector<Tile> tiles_of(const Params& p, int64_t batches, const std::vector<int>& edges, int most) {
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

int64_t pairs_of(const std::vector<Tile>& tiles) {
  int64_t pairs = 0;
  for (const Tile& tile : tiles)
    for (int i = 0; i < 2; ++i) pairs += int64_t(tile.count) * std::max(tile.end[i] - tile.first[i], 0);
  return pairs;
}

// Tiles end where a query's place in the line jumps: a new document. Half as many rows a tile cost a little, and are
// taken where rules leave that much less to compute, as narrow windows do.
void cut_tiles(Call& call, int64_t batches) {
  Params& p = call.p;
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

void check_rows(const Params& p, int64_t batches) {
  for (int64_t n = 0; n < batches * p.queries; ++n) {
    const int32_t* r = p.rows + n * 5;
    for (int i = 0; i < 2; ++i) {
      const int first = r[2 * i], end = r[2 * i + 1];
      STD_TORCH_CHECK(0 <= first && first <= end && end <= p.keys, "rows: keys [", first, ", ", end, ") of ", p.keys);
    }
  }
}

// Columns (heads) of a bias times the unit of logits, each turned round if asked, with `margin` floats around.
std::vector<float> columns(const float* from, int64_t heads, int64_t length, int64_t head_stride, int64_t stride,
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

void describe_biases(Call& call, const OptionalTensor& bias, const OptionalTensor& line, const OptionalTensor& table,
                     const OptionalTensor& index, const Ints& grid) {
  Params& p = call.p;
  const float unit = p.softcap > 0.0f ? 1.0f : float(LOG2_E);
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

Call describe(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias, const OptionalTensor& line,
              const OptionalTensor& table, const OptionalTensor& sinks, const OptionalTensor& mask,
              const OptionalTensor& index, const OptionalTensor& rows, const OptionalTensor& seed, const Ints& grid,
              double scale, double softcap, double dropout_p) {
  Call call;
  Params& p = call.p;
  p.q = strided(q, "q"), p.k = strided(k, "k"), p.v = strided(v, "v");
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2), p.keys = k.size(2), p.kv_heads = k.size(1);
  p.head_dim = int(q.size(3)), p.value_dim = int(v.size(3));
  p.dtype = dtype_of(q, "softmax_attention takes");
  STD_TORCH_CHECK(k.size(0) == p.batch && v.size(0) == p.batch && v.size(1) == p.kv_heads && v.size(2) == p.keys &&
                      k.size(3) == p.head_dim && p.kv_heads > 0 && p.heads % p.kv_heads == 0,
                  "q, k and v do not fit");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k, v differ in dtype");
  STD_TORCH_CHECK(p.queries < (1 << 30) && p.keys < (1 << 30), "too many tokens");
  p.scale = float(scale), p.softcap = float(softcap);
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
  if (sinks) {
    STD_TORCH_CHECK(sinks->stride(0) == 1 || sinks->numel() == 1, "sinks must be contiguous");
    check_f32(sinks, "sinks", p.heads);
    p.sinks = data_or_null(sinks);
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
Tensor allocate(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens, int64_t size) {
  if (heads > 1 && like.stride(1) < like.stride(2))
    return torch::stable::transpose(torch::stable::new_empty(like, {batch, tokens, heads, size}), 1, 2);
  return torch::stable::new_empty(like, {batch, heads, tokens, size});
}

// Rows of queries a forward task holds: enough to pay for packing its keys, few enough for the second-level cache.
int64_t rows_of_task(const Params& p) {
  return std::clamp<int64_t>(65536 / (p.head_dim + p.value_dim), TILE_ROWS, 1024);
}

// Runs of tiles of even length; a document of a packed batch has its own, which then begins with its first key.
std::vector<int> cut_chunks(Call& call) {
  Params& p = call.p;
  const int64_t most = std::max<int64_t>(rows_of_task(p) / p.tile_rows, 1), tiles = p.tile_count;
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

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor bias, OptionalTensor line,
                                           OptionalTensor table, OptionalTensor sinks, OptionalTensor mask,
                                           OptionalTensor index, OptionalTensor rows, OptionalTensor seed, Ints grid,
                                           std::string, double scale, double softcap, double dropout_p) {
  Call call = describe(q, k, v, bias, line, table, sinks, mask, index, rows, seed, grid, scale, softcap, dropout_p);
  Params& p = call.p;
  Tensor out = allocate(q, p.batch, p.heads, p.queries, p.value_dim);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.queries}, ScalarType::Float);
  const bool adds = bias || line || table;
  Tensor peak = torch::stable::new_empty(q, adds ? Ints{2, p.batch, p.heads, p.queries} : Ints{0}, ScalarType::Float);
  p.out = strided(out, "out");
  p.lse = mutable_floats(lse);
  p.peak = adds ? mutable_floats(peak) : nullptr;
  const std::vector<int> edges = cut_chunks(call);
  p.chunk_edges = edges.data();
  p.chunks = int64_t(edges.size()) - 1;
  const int64_t pairs = p.batch * p.kv_heads;
  auto run = ACCEL_LEVEL(softmax::softmax_attention_forward);
  torch::stable::parallel_for(0, pairs * p.chunks, 1, [&](int64_t from, int64_t to) { run(p, from, to); });
  return {out, lse, peak};
}

// One owner for every sum: what is broadcast over an axis makes one task of that axis. Runs of keys, and runs of the
// batch where each needs a bias gradient of its own, are as many as keep a few dozen workers busy, and no more.
void split(BackwardParams& b, bool partial_bias, const OptionalTensor& bias, bool want_bias) {
  constexpr int64_t TASKS = 16, SHORTEST = 512;
  const Params& p = b.forward;
  const bool one_batch = want_bias && bias->size(0) == 1, one_head = want_bias && bias->size(1) == 1;
  const bool one_key = want_bias && bias->size(3) == 1;
  b.head_runs = one_head ? 1 : p.kv_heads;
  b.batch_runs = one_batch ? 1 : partial_bias ? std::clamp<int64_t>(2 * TASKS / b.head_runs, 1, p.batch) : p.batch;
  const int64_t wanted = one_key ? 1 : (TASKS + b.batch_runs * b.head_runs - 1) / (b.batch_runs * b.head_runs);
  const int64_t shortest = one_head || one_batch ? BLOCK_KEYS : SHORTEST;
  const int64_t runs = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(p.keys / shortest, 1));
  const int64_t keys = std::max<int64_t>((p.keys + runs - 1) / runs, 1);
  b.keys_per_run = (keys + BLOCK_KEYS - 1) / BLOCK_KEYS * BLOCK_KEYS;
  b.key_runs = std::max<int64_t>((p.keys + b.keys_per_run - 1) / b.keys_per_run, 1);
}

// to[i·step] (turned round if asked) = Σ over parts, in their order.
void reduce(const float* from, int64_t parts, int64_t part_stride, int64_t length, float* to, int64_t step, bool turned) {
  for (int64_t i = 0; i < length; ++i) {
    float sum = from[i];
    for (int64_t c = 1; c < parts; ++c) sum += from[c * part_stride + i];
    to[(turned ? length - 1 - i : i) * step] = sum;
  }
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Grads backward(Tensor grad_out, Tensor delta, Tensor lse, Tensor peak, Tensor q, Tensor k, Tensor v,
               OptionalTensor bias, OptionalTensor line, OptionalTensor table, OptionalTensor sinks, OptionalTensor mask,
               OptionalTensor index, OptionalTensor rows, OptionalTensor seed, Ints grid, std::string, double scale,
               double softcap, double dropout_p, bool want_bias, bool want_line, bool want_table) {
  Call call = describe(q, k, v, bias, line, table, sinks, mask, index, rows, seed, grid, scale, softcap, dropout_p);
  Params& p = call.p;
  const int64_t per_query = p.batch * p.heads * p.queries;
  check_f32(delta, "delta", per_query);
  check_f32(lse, "lse", per_query);
  p.lse = mutable_floats(lse);
  if (bias || line || table) {
    check_f32(peak, "peak", 2 * per_query);
    p.peak = mutable_floats(peak);
  }
  want_bias = want_bias && bias;
  want_line = want_line && line;
  want_table = want_table && table;

  BackwardParams b{};
  b.forward = p;
  b.grad_out = strided(grad_out, "grad_out");
  STD_TORCH_CHECK(grad_out.size(0) == p.batch && grad_out.size(1) == p.heads && grad_out.size(2) == p.queries &&
                      grad_out.size(3) == p.value_dim && grad_out.scalar_type() == q.scalar_type(),
                  "grad_out must have the shape and dtype of the output");
  b.delta = data_or_null(delta);
  split(b, want_line || want_table, bias, want_bias);
  Tensor grad_q = allocate(q, p.batch, p.heads, p.queries, p.head_dim);
  Tensor grad_k = allocate(k, p.batch, p.kv_heads, p.keys, p.head_dim);
  Tensor grad_v = allocate(v, p.batch, p.kv_heads, p.keys, p.value_dim);
  b.grad_q = strided(grad_q, "grad_q"), b.grad_k = strided(grad_k, "grad_k"), b.grad_v = strided(grad_v, "grad_v");

  auto floats = [&](bool wanted, Ints shape) {
    if (!wanted) shape = {0};
    return torch::stable::new_empty(q, shape, ScalarType::Float);
  };
  Ints bias_shape(4);
  for (int i = 0; i < 4 && want_bias; ++i) bias_shape[size_t(i)] = bias->size(i);
  Tensor grad_bias = floats(want_bias, bias_shape);
  if (want_bias) {
    torch::stable::zero_(grad_bias);
    b.grad_bias = mutable_floats(grad_bias);
    broadcast_strides(p, grad_bias, "grad_bias", b.grad_bias_stride);
  }
  const int64_t parts = b.batch_runs * b.key_runs;
  Tensor part_q = floats(b.key_runs > 1, {b.key_runs, per_query * p.head_dim});
  Tensor part_line = floats(want_line, {parts, p.heads, p.line_length});
  Tensor part_table = floats(want_table, {parts, p.heads, p.table_rows});
  b.part_q = b.key_runs > 1 ? mutable_floats(part_q) : nullptr;
  b.part_line = want_line ? mutable_floats(part_line) : nullptr;
  b.part_table = want_table ? mutable_floats(part_table) : nullptr;

  auto run = ACCEL_LEVEL(softmax::softmax_attention_backward);
  torch::stable::parallel_for(0, b.batch_runs * b.head_runs * b.key_runs, 1,
                              [&](int64_t from, int64_t to) { run(b, from, to); });
  if (b.part_q) {
    auto sum = ACCEL_LEVEL(softmax::softmax_attention_sum_queries);
    torch::stable::parallel_for(0, p.batch * p.heads, 1, [&](int64_t from, int64_t to) { sum(b, from, to); });
  }
  Tensor grad_line = floats(want_line, {p.heads, p.line_length});
  Tensor grad_table = floats(want_table, {p.table_rows, p.heads});
  for (int64_t h = 0; h < p.heads; ++h) {
    if (want_line)
      reduce(b.part_line + h * p.line_length, parts, p.heads * p.line_length, p.line_length,
             mutable_floats(grad_line) + h * p.line_length, 1, true);
    if (want_table)
      reduce(b.part_table + h * p.table_rows, parts, p.heads * p.table_rows, p.table_rows,
             mutable_floats(grad_table) + h, p.heads, !index);
  }
  return {grad_q, grad_k, grad_v, grad_bias, grad_line, grad_table};
}

}  // namespace
}  // namespace accel::softmax_attention

#define ACCEL_SOFTMAX_ARGUMENTS                                                                                     \
  "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? line, Tensor? bias_table, Tensor? sinks, Tensor? mask, "     \
  "Tensor? bias_index, Tensor? rows, Tensor? seed, int[] grid, str rule, float scale, float softcap, float dropout_p"

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def("softmax_attention_forward(" ACCEL_SOFTMAX_ARGUMENTS ") -> (Tensor, Tensor, Tensor)");
  m.def("softmax_attention_backward(Tensor grad_out, Tensor delta, Tensor lse, Tensor peak, " ACCEL_SOFTMAX_ARGUMENTS
        ", bool want_bias, bool want_line, bool want_table) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("softmax_attention_forward", TORCH_BOX(&accel::softmax_attention::forward));
  m.impl("softmax_attention_backward", TORCH_BOX(&accel::softmax_attention::backward));
}
