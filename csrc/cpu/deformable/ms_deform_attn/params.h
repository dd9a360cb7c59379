// Sums of weighted samples, as ms_deform_attn and deform_attention2d both are: what a binding hands to the kernel, plain
// pointers and sizes, no torch type.
#pragma once

#include <cstdint>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel::ms_deform_attn {

// What holds for point p of every query and head. Its position on the map, in pixels, is
//   base of the query + place + scale · (what the tensor of positions says).
struct Point {
  float place_y, place_x, scale_y, scale_x;
  int32_t height, width, start;  // of its level; height 0 leaves the point out
};

struct Params {
  int64_t batch, pixels, heads, channels, queries;  // N, S, M, D, Q
  int points;                                       // P, of all levels
  Dtype dtype;
  const void* value;       // (N, S, M, D)
  const float* positions;  // (N, Q, M, P, 2), x before y
  const float* weights;    // (N, Q, M, P)
  bool softmax;            // of the weights over P
  bool border_gradient;    // a position at exactly −1 has a gradient
  const Point* point;      // (P)
  int64_t line;            // the base is (first_y + q / line · step_y, first_x + q % line · step_x)
  float first_y, first_x, step_y, step_x;
};

// The rows of one head are a kilobyte apart in `value`, in an eighth of the cache's sets. Where each is read often, the
// maps of a few (batch, head) pairs at a time are packed first. Ranges of work count from `first_pair` on.
struct Forward {
  Params p;
  void* out;  // (N, Q, M, D)
  void* packed;  // (some pairs, S + 1, D) in value's dtype, the last row zeros, or null: rows are read where they are
  int64_t first_pair;
  int64_t chunk;  // queries of a unit of work
  bool stream;    // rows of `out` are whole cache lines, too many to stay in the caches
  int64_t map() const { return (p.pixels + 1) * p.channels; }  // elements
};

// A task is a pair and a part of its queries, and owns a map of gradients of the pair. Parts follow from shapes alone, so
// that sums have the same order whatever the number of threads.
struct Backward {
  Params p;
  const void* grad_out;
  void* grad_value;       // or null
  float* grad_positions;  // or null
  float* grad_weights;    // or null
  float* maps;            // (tasks, S + 1, row), or null: sums are made in grad_value, which is fp32 then
  int64_t row;            // floats, those of a pixel's value as it is and then its sums
  int64_t values;         // floats that hold a pixel's value, 0 unless packed
  bool packed;
  int64_t first_pair, parts;
  int64_t map() const { return (p.pixels + 1) * row; }  // floats
};

}  // namespace accel::ms_deform_attn

ACCEL_DECLARE(ms_deform_attn, samples,
  void pack_maps(const Forward& f, int64_t from, int64_t to);  // rows of the pairs' maps
  void sum_samples(const Forward& f, int64_t from, int64_t to);  // units: (pair, chunk of queries)
  void sum_gradients(const Backward& b, int64_t from, int64_t to);  // tasks: (pair, part)
  void collect_maps(const Backward& b, int64_t from, int64_t to);  // rows of the pairs' maps
)
