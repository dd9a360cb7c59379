// What the bindings of ps_roi_align and ps_roi_pool hand to the kernel: plain pointers and sizes, no torch type.
#pragma once

#include <cstdint>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel::ps_roi_align {

// A bin on one axis: the weights of `count` pixels from `first` on, and what their sum is divided by.
struct Span {
  int32_t first, count;
  int64_t weights;  // where they begin in Params::weights
  float divisor;
};

constexpr int PADDING = 16;  // floats behind the last weight that vectors may read

struct Params {
  int64_t batch, channels, height, width, boxes;
  int bins_y, bins_x;
  Dtype dtype;
  const int64_t* image;  // of each box, −1 where the box has no bins
  const Span* rows;      // (K, bins_y)
  const Span* columns;   // (K, bins_x)
  const float* weights;
};

struct Forward {
  Params p;
  const void* input;  // (N, C, H, W)
  void* out;          // (K, C)
};

struct Backward {
  Params p;
  const void* grad_out;  // (K, C)
  void* grad_input;      // (N, C, H, W)
};

}  // namespace accel::ps_roi_align

ACCEL_DECLARE(ps_roi_align, bins,
  void gather_bins(const Forward& f, int64_t from, int64_t to);  // boxes
  void spread_bins(const Backward& b, int64_t from, int64_t to);  // planes, one a channel
)
