// Rows of a relative position bias table over a grid of up to three axes: windows of Swin, patches of BEiT.
#pragma once

#include <algorithm>
#include <cstdint>

namespace accel::ACCEL_ISA {

// A line of keys (one y of the grid) has consecutive rows, downwards.
struct TableIndex {
  int64_t stride_z, stride_y;
  const int64_t* size;  // z, y, x

  explicit TableIndex(const int64_t* size)
      : stride_z((2 * size[1] - 1) * (2 * size[2] - 1)), stride_y(2 * size[2] - 1), size(size) {}

  int64_t rows() const { return (2 * size[0] - 1) * stride_z; }

  // f(first key j, its table row, number of keys) for every line of the keys [from, to) of query i.
  template <typename F>
  void for_each_line(int64_t i, int64_t from, int64_t to, F f) const {
    const int64_t xi = i % size[2], yi = i / size[2] % size[1], zi = i / (size[2] * size[1]);
    for (int64_t j = from; j < to;) {
      const int64_t x = j % size[2], y = j / size[2] % size[1], z = j / (size[2] * size[1]);
      const int64_t count = std::min(size[2] - x, to - j);
      f(j, (zi - z + size[0] - 1) * stride_z + (yi - y + size[1] - 1) * stride_y + xi - x + size[2] - 1, count);
      j += count;
    }
  }
};

}  // namespace accel::ACCEL_ISA
