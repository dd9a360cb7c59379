// What the bindings of ms_deform_attn and deform_attention2d do alike: checks, the choice of maps and parts, threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "cpu/_binding.h"
#include "params.h"

namespace accel::ms_deform_attn {

using Grads = std::tuple<Tensor, Tensor, Tensor>;

// The sizes, and the three tensors that must agree with them.
inline Params describe(const Tensor& value, const Tensor& positions, const Tensor& weights, int64_t batch,
                       int64_t pixels, int64_t heads, int64_t channels, int64_t queries, const std::vector<Point>& point) {
  constexpr int64_t MOST = (int64_t(1) << 31) - 2;
  Params p{};
  p.batch = batch, p.pixels = pixels, p.heads = heads, p.channels = channels, p.queries = queries;
  STD_TORCH_CHECK(pixels > 0 && pixels <= MOST && heads > 0 && channels > 0 && channels <= MOST,
                  "a map must have pixels, heads and channels, at most 2^31 − 2 of each");
  STD_TORCH_CHECK(!point.empty() && point.size() <= 1 << 20, "there must be points, at most 2^20");
  p.points = int(point.size());
  p.dtype = dtype_of(value, "samples are taken of");
  check_cpu(value, "the map");
  STD_TORCH_CHECK(value.numel() == batch * pixels * heads * channels, "the map has ", value.numel(), " elements");
  const int64_t samples = batch * queries * heads * p.points;
  check_f32(positions, "the tensor of positions", 2 * samples);
  check_f32(weights, "the tensor of weights", samples);
  p.value = value.const_data_ptr();
  p.positions = static_cast<const float*>(positions.const_data_ptr());
  p.weights = static_cast<const float*>(weights.const_data_ptr());
  p.point = point.data();
  p.line = 1;
  p.border_gradient = true;
  return p;
}

constexpr int64_t CACHED_BYTES = 256 << 10;         // of a batch entry's map, which packing would not bring nearer
constexpr int64_t STREAMED_BYTES = 16 << 20;        // of an output, which is not in the caches when it is read next
constexpr int64_t READS_THAT_PAY = 8;               // of a pixel, for packing its head's map
constexpr int64_t MOST_OF_MAP = int64_t(1) << 31;   // bytes, whose indices are 32-bit
constexpr int64_t QUERIES_OF_TASK = 64;
constexpr int64_t TASKS = 8;  // of a batch entry's backward, which keep as many threads busy

// How often a pixel's row is read, were all samples spread evenly.
inline int64_t reads(const Params& p) { return 4 * p.queries * p.points / p.pixels; }

inline int64_t count_threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Maps of (batch, head) pairs are made and used by turns. As far as there are as many pairs for every thread, each
// thread takes its own, one after the other: alone(pair, number of its map, below `threads`). It waits for no other
// thread then and reads no map out of another's caches, which may be far. Fewer pairs than threads are left over, and
// all threads work on their maps: together(first pair, how many).
template <typename Alone, typename Together>
inline void by_turns(int64_t pairs, int64_t threads, const Alone& alone, const Together& together) {
  const int64_t rest = pairs % threads;
  std::atomic<int64_t> taken{0};
  if (pairs > rest)
    torch::stable::parallel_for(0, pairs - rest, 1, [&](int64_t from, int64_t to) {
      const int64_t map = taken++;
      STD_TORCH_CHECK(map < threads, "work was handed out to more than ", threads, " threads");
      for (; from < to; ++from) alone(from, map);
    });
  if (rest > 0) together(pairs - rest, rest);
}

// Room for maps, whose rows do not share more lines than they must: processors fetch them by twos.
constexpr int64_t TWO_LINES = 128;
inline Tensor room_for(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes + TWO_LINES}, ScalarType::Byte);
}
inline void* start_of(Tensor& room) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(room.mutable_data_ptr());
  return reinterpret_cast<void*>((from + TWO_LINES - 1) / TWO_LINES * TWO_LINES);
}

inline bool streams(int64_t bytes, int64_t row, const void* out) {
  constexpr uintptr_t LINE = 64;
  return bytes >= STREAMED_BYTES && uintptr_t(row) % LINE == 0 && reinterpret_cast<uintptr_t>(out) % LINE == 0;
}

inline Tensor run_forward(const Params& p, const Tensor& value, const Ints& shape) {
  Tensor out = torch::stable::new_empty(value, shape);
  Forward f{};
  f.p = p;
  f.out = out.mutable_data_ptr();
  f.chunk = QUERIES_OF_TASK;
  f.stream = streams(out.numel() * int64_t(out.element_size()), p.channels * int64_t(out.element_size()), f.out);
  const int64_t all = p.batch * p.heads, chunks = (p.queries + f.chunk - 1) / f.chunk, rows = p.pixels + 1;
  if (all * chunks == 0) return out;
  auto pack = ACCEL_LEVEL(samples::pack_maps), run = ACCEL_LEVEL(samples::sum_samples);
  auto together = [&](int64_t first, int64_t pairs) {
    f.first_pair = first;
    if (f.packed)
      torch::stable::parallel_for(0, pairs * rows, 256, [&](int64_t from, int64_t to) { pack(f, from, to); });
    torch::stable::parallel_for(0, pairs * chunks, 1, [&](int64_t from, int64_t to) { run(f, from, to); });
  };
  const int64_t bytes = f.map() * int64_t(value.element_size());
  if (reads(p) < READS_THAT_PAY || p.heads == 1 || bytes * p.heads <= CACHED_BYTES || bytes > MOST_OF_MAP) {
    together(0, all);
    return out;
  }
  const int64_t threads = count_threads();
  Tensor room = room_for(value, std::min(all, threads) * bytes);
  f.packed = start_of(room);
  auto alone = [&](int64_t pair, int64_t map) {
    Forward own = f;
    own.first_pair = pair, own.packed = static_cast<char*>(f.packed) + map * bytes;
    pack(own, 0, rows);
    run(own, 0, chunks);
  };
  by_turns(all, threads, alone, together);
  return out;
}

// Tasks enough for some threads, and in each of them reads enough to pay for a map of its own. By the shape of a batch
// entry alone, whose gradients do not depend on the others then.
inline int64_t parts_of(const Params& p) {
  return std::clamp<int64_t>(std::min(TASKS / p.heads, reads(p) / 16), 1, std::max<int64_t>(1, p.queries));
}

inline Grads run_backward(const Params& p, const Tensor& grad_out, const Tensor& value, const Tensor& positions,
                          const Tensor& weights, const Bools& needs) {
  check_cpu(grad_out, "grad_out");
  STD_TORCH_CHECK(grad_out.scalar_type() == value.scalar_type() &&
                      grad_out.numel() == p.batch * p.queries * p.heads * p.channels,
                  "grad_out must have the dtype and shape of the output");
  STD_TORCH_CHECK(needs.size() == 3, "needs must be three");
  auto like = [&](const Tensor& x, bool needed) {
    return needed ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  };
  Tensor grad_value = like(value, needs[0]), grad_positions = like(positions, needs[1]);
  Tensor grad_weights = like(weights, needs[2]);
  Backward b{};
  b.p = p;
  b.grad_out = grad_out.const_data_ptr();
  b.grad_value = needs[0] ? grad_value.mutable_data_ptr() : nullptr;
  b.grad_positions = needs[1] ? mutable_floats(grad_positions) : nullptr;
  b.grad_weights = needs[2] ? mutable_floats(grad_weights) : nullptr;
  const int64_t all = p.batch * p.heads;
  if (all == 0 || !(needs[0] || needs[1] || needs[2])) return {grad_value, grad_positions, grad_weights};

  b.parts = parts_of(p);
  b.values = (p.channels * int64_t(value.element_size()) + 3) / 4;
  b.row = b.values + p.channels;
  b.packed = needs[0] && reads(p) >= READS_THAT_PAY && 4 * b.map() <= MOST_OF_MAP;
  if (!b.packed) b.values = 0, b.row = p.channels;
  auto run = ACCEL_LEVEL(samples::sum_gradients), collect = ACCEL_LEVEL(samples::collect_maps);
  auto together = [&](int64_t first, int64_t pairs) {
    b.first_pair = first;
    torch::stable::parallel_for(0, pairs * b.parts, 1, [&](int64_t from, int64_t to) { run(b, from, to); });
    if (b.maps)
      torch::stable::parallel_for(0, pairs * p.pixels, 512, [&](int64_t from, int64_t to) { collect(b, from, to); });
  };
  if (!needs[0] || (!b.packed && b.parts == 1 && p.dtype == Dtype::f32)) {
    together(0, all);
    return {grad_value, grad_positions, grad_weights};
  }
  const int64_t floats = b.parts * b.map(), threads = count_threads();
  Tensor room = room_for(value, std::min(all, threads) * 4 * floats);
  b.maps = static_cast<float*>(start_of(room));
  auto alone = [&](int64_t pair, int64_t map) {
    Backward own = b;
    own.first_pair = pair, own.maps = b.maps + map * floats;
    run(own, 0, b.parts);
    collect(own, 0, p.pixels);
  };
  by_turns(all, threads, alone, together);
  return {grad_value, grad_positions, grad_weights};
}

}  // namespace accel::ms_deform_attn
