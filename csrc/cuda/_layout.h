// Swapping two axes, for what is channels-last on one side and not on the other. Every pointer is to device memory.
#pragma once

#include <cstdint>

namespace accel {

struct Transpose {
  const void* from;  // (images, rows, columns), contiguous
  void* to;          // (images, columns, rows)
  int64_t images;
  int32_t rows, columns;
  int32_t bytes;  // of an element: 2 or 4
};

}  // namespace accel

// 0, or a cudaError_t.
extern "C" int accel_transpose(const accel::Transpose* p, void* stream);
