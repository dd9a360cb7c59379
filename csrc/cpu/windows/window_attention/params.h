// What the binding hands to a kernel: plain pointers and sizes, no torch type.
#pragma once

#include <cstdint>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel::window_attention {

struct Params {
  int64_t batch, windows;  // windows of one image
  int64_t size[3], window[3], shift[3], padded[3], count[3];
  int tokens, heads, head_dim;  // N, H, D
  bool roll_first;
  float scale, mask_value;
  Dtype dtype;
  const void* qkv;           // (B, Z, Y, X, 3, H, D)
  const float* logit_bias;   // (H or 1, N, ld): bias · log2(e), −∞ in the columns from N to ld
  int64_t bias_head_stride;  // N · ld, or 0 where all heads share one
  const float* head_scale;   // (H), or null: scaled dot product
  const float* qkv_bias;     // (3, H, D), or null: zeros
  bool dropout;
  uint64_t seed;
  uint64_t drop_below;  // keep a weight when its random word is at least this
  float keep_scale;     // 1 / (1 − p)

  void* out;   // (B, Z, Y, X, H, D)
  float* lse;  // (B·windows, H, N)
};

// A backward task is a group of heads and a run of windows. Both follow from shapes alone, so that sums have the same
// order whatever the number of threads.
struct BackwardParams {
  Params forward;
  const void* grad_out;
  void* grad_qkv;
  int64_t groups, group_heads;  // heads in groups of group_heads, the last one shorter
  int64_t chunks;               // runs of windows; tasks = groups · chunks
  bool want_table, want_dense;
  int64_t table_rows;
  float* part_bias;        // (H, chunks, table_rows) or (H, chunks, N, N) or null
  float* part_head_scale;  // (H, chunks) or null
  float* part_qkv_bias;    // (H, chunks, 3, D) or null
};

// ld of a row of N logits: whole vectors of the level in use.
constexpr int64_t padded_to(int64_t n, int64_t width) { return (n + width - 1) / width * width; }

}  // namespace accel::window_attention

ACCEL_DECLARE(window_attention, window,
  int width();
  void expand_bias(const Params& p, const float* table, const float* dense, float* out, int64_t from, int64_t to);
  void window_attention_forward(const Params& p, int64_t from, int64_t to);
  void window_attention_backward(const BackwardParams& p, int64_t from, int64_t to);
)
