// What the binding hands to a kernel: plain pointers and sizes, no torch type.
#pragma once

#include <cstdint>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel::deform_conv2d {

// (N, channels, pixels) in elements; contiguous or channels_last.
struct Map {
  void* data;
  int64_t image, channel, pixel;
};

constexpr int DEPTH = 128;       // channels that enter a forward product at a time
constexpr int PANEL = 64;        // output channels whose weights lie together
constexpr int LEAST_CHUNK = 16;  // channels a backward task owns, a multiple of this many where they allow it
constexpr int POSITIONS = 64;    // outputs a backward task handles together
constexpr int PIXELS_OF_TASK = 256;  // that are packed together

struct Params {
  int64_t batch, channels, height, width, out_channels, out_h, out_w;
  int64_t kernel[2], stride[2], padding[2], dilation[2];  // y, x
  int64_t groups, offset_groups;
  bool border_gradient;  // a position at exactly −1 has a gradient
  Dtype dtype;
  Map input, out;
  const float* offset;  // (N, 2·G·K, Ho·Wo)
  const float* mask;    // (N, G·K, Ho·Wo), or null
  const void* weight;   // (O, C/g, kh·kw)
  const float* bias;    // or null

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t pixels() const { return height * width; }
  int64_t outputs() const { return out_h * out_w; }
  int64_t in_group() const { return channels / groups; }       // C/g
  int64_t out_group() const { return out_channels / groups; }  // O/g
};

struct ForwardParams {
  Params p;
  int64_t first_image, images;  // that are computed together
  int64_t tiles, tile;          // of an image, and the most positions in one
  // Images with channels inside pixels: the input itself, or `image`, where pack_image puts it with rows of `row`
  // elements and LEAST_CHUNK zeros behind them, which vectors may read.
  bool packed;
  void* image;
  int64_t row;
  // Words of the weight per group, panel of PANEL output channels, block of DEPTH and tap: as pack_weight puts them.
  float* weight;
};

inline int64_t image_size(const ForwardParams& f) { return f.p.pixels() * f.row + LEAST_CHUNK; }

// A backward task owns the channels [first, first + count) of one weight group and one offset group.
struct Chunk {
  int64_t first, count;
};

struct BackwardParams {
  Params p;
  Map grad_out, grad_input;
  const Chunk* chunks;
  int64_t chunk_count, width;   // channels that every chunk is padded to
  int64_t first_image, images;  // of this round
  int64_t first_chunk;          // of this round: chunk `first_chunk + i` writes part i of `spots`
  float* grad_weight;           // (chunks, O/g, K, width), summed over rounds; null if not wanted
  float* spots;                 // (chunks of a round, images, 3, K, Ho·Wo) gradients of y, x and mask; null likewise
  float* grad_offset;           // (N, 2·G·K, Ho·Wo), null if not wanted
  float* grad_mask;             // (N, G·K, Ho·Wo), null if not wanted
  void* weight_result;          // (O, C/g, K) in the dtype of the weight
  float* grad_bias;             // (O,)
  bool want_input;
};

}  // namespace accel::deform_conv2d

ACCEL_DECLARE(deform_conv2d, deform,
  int64_t weight_words(const Params& p);
  void pack_weight(const ForwardParams& f, int64_t from, int64_t to);
  void pack_image(const ForwardParams& f, int64_t from, int64_t to);
  void forward(const ForwardParams& f, int64_t from, int64_t to);
  void backward(const BackwardParams& b, int64_t from, int64_t to);
  void sum_spots(const BackwardParams& b, int64_t chunks, int64_t from, int64_t to);
  void unpack_grad_weight(const BackwardParams& b, int64_t from, int64_t to);
  void sum_bias(const BackwardParams& b, int64_t from, int64_t to);
)
