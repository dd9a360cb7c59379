// Swapping two axes at the speed of memory: a block turns one tile in shared memory. torch copies between formats element
// by element, several times slower.

#include "cuda/_layout.h"

#include "launch.cuh"

namespace accel {
namespace {

constexpr int side = 64, lines = 4;

template <class T>
__global__ void __launch_bounds__(side * lines)
    swap_axes(const T* from, T* to, int rows, int columns, int across, int down) {
  ACCEL_SHARED(T, tile, [side][side + 4 / sizeof(T)]);  // columns of the tile in banks of their own
  int64_t block = blockIdx.x;
  int column0 = int(block % across) * side;
  int row0 = int(block / across % down) * side;
  int64_t image = block / across / down * rows * columns;
  int lane = int(threadIdx.x) % side, line = int(threadIdx.x) / side;
  for (int i = line; i < side; i += lines)
    if (row0 + i < rows && column0 + lane < columns)
      tile[i][lane] = from[image + int64_t{row0 + i} * columns + column0 + lane];
  __syncthreads();
  for (int i = line; i < side; i += lines)
    if (column0 + i < columns && row0 + lane < rows)
      to[image + int64_t{column0 + i} * rows + row0 + lane] = tile[lane][i];
}

template <class T>
int run(const Transpose& p, cudaStream_t stream) {
  int across = (p.columns + side - 1) / side, down = (p.rows + side - 1) / side;
  int64_t blocks = p.images * across * down;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(swap_axes<T>, dim3(unsigned(blocks)), dim3(side * lines), 0, stream, static_cast<const T*>(p.from),
                static_cast<T*>(p.to), p.rows, p.columns, across, down);
}

}  // namespace
}  // namespace accel

extern "C" int accel_transpose(const accel::Transpose* p, void* stream) {
  if (p->images < 0 || p->rows < 0 || p->columns < 0) return cudaErrorInvalidValue;
  if (p->bytes == 2) return accel::run<uint16_t>(*p, cudaStream_t(stream));
  if (p->bytes == 4) return accel::run<uint32_t>(*p, cudaStream_t(stream));
  return cudaErrorInvalidValue;
}
