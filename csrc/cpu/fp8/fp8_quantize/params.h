// What the binding of fp8_quantize hands to the kernel: plain pointers and sizes, no torch type.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel::fp8_quantize {

enum class Format : int { e4m3, e5m2 };
enum class ScaleFormat : int { fp32, pow2, e8m0 };

inline int64_t count_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// What is made of x (batch, height, width): codes and scales as they lie or, `turned`, of xᵀ. Blocks are given as x has
// them: one of r rows and c columns of xᵀ is `rows` = c and `cols` = r.
struct Params {
  const void* x;
  int64_t batch, height, width;
  int64_t rows, cols;
  bool turned;
  Dtype dtype;
  Format format;
  ScaleFormat scale_format;
  uint8_t* codes;
  void* scales;

  int64_t bands() const { return count_of(height, rows); }   // rows of blocks, of one matrix
  int64_t across() const { return count_of(width, cols); }  // blocks of a band
  // A band that is too tall to stay in the cache is measured in pieces, all of them before the first is encoded.
  int64_t piece() const { return std::min<int64_t>(rows, 256); }
  int64_t pieces() const { return count_of(rows, piece()); }  // of a band
};

}  // namespace accel::fp8_quantize

ACCEL_DECLARE(fp8_quantize, fp8,
  void quantize(const Params& p, int64_t from, int64_t to);  // bands of all matrices, each of one piece
  // The same of bands of many pieces: largest values of their blocks (band, piece, block), then scales and factors
  // (band, block) of all, then codes. Ranges are of the pieces of all bands.
  void measure(const Params& p, float* largest, int64_t from, int64_t to);
  void settle(const Params& p, const float* largest, float* factors);
  void encode_pieces(const Params& p, const float* factors, int64_t from, int64_t to);
)
