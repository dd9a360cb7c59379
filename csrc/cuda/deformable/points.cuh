// Weighted sums of samples, and the gradients of positions and weights. A row is a query and a head, and has its own
// points; a group of lanes owns it, 16 bytes of its channels a lane. Where rows are few, several such groups share out
// its points. A warp first works out the corners of up to 128 points of its rows, each once, and leaves them in shared
// memory.
//
// What differs from op to op is a Source, a plain struct with
//   Rows n                                        sizes
//   float2 begin_row(row, sub, lanes)             what the points of a row share; all its lanes call it
//   Point point(row, k, shared)                   the k-th point of a row
//   void write(row, k, grad_y, grad_x, grad_weight)
#pragma once

#include "cuda/deformable/gather.cuh"
#include "cuda/deformable/transpose.cuh"

namespace accel {

// The map that is sampled is (batch, pixels, heads, channels); a row is ((image · queries) + query) · heads + head.
struct Rows {
  int batch, queries, heads, channels, pixels, points;

  __host__ __device__ int64_t count() const { return int64_t{batch} * queries * heads; }
};

struct Point {
  float y, x, weight;
  float scale_y, scale_x;  // pixels by which the position moves with what is differentiated
  int level;
  Map map;
};

// Gradients that come in: image and query · query + point · point + head · channels, in elements.
struct GradRows {
  int64_t query, point;
};

namespace points {

constexpr int warps = 4, threads = 32 * warps, at_once = 128;

// How a row is shared out: `lanes` for its channels in each of `parts` for its points.
struct Split {
  int lanes, parts;
  __host__ __device__ int all() const { return lanes * parts; }
};

constexpr int64_t busy_threads = 1 << 17;  // as many as an H100 has in flight

// The order of every sum, so chosen by the call alone.
inline Split split_for(const Rows& n, int lanes) {
  int parts = 1;
  while (2 * parts * lanes <= 32 && 2 * parts <= n.points && n.count() * lanes * parts < busy_threads) parts *= 2;
  return {lanes, parts};
}

// The rows of a warp, and the place of this lane among them.
struct Share {
  int rows, chunk;       // of the warp at once; points of each row at once
  int group, part, sub;  // which row, which of its points, which of its channels
  int64_t first;         // row of the warp

  __device__ explicit Share(Split split) {
    int lane = int(threadIdx.x) % 32;
    rows = 32 / split.all();
    chunk = at_once / rows;
    group = lane / split.all();
    part = lane / split.lanes % split.parts;
    sub = lane % split.lanes;
    first = (int64_t{blockIdx.x} * warps + threadIdx.x / 32) * rows;
  }
};

template <class T>
__device__ __forceinline__ const T* pixels_of(const T* map, const Rows& n, int64_t row) {
  int64_t image = row / (int64_t{n.queries} * n.heads);
  return map + (image * n.pixels * n.heads + row % n.heads) * n.channels;
}

// What the points of each of the warp's rows share, where every lane finds it.
template <class Source>
__device__ __forceinline__ void begin_rows(const Source& source, const Share& share, Split split, float2 (&shared)[32]) {
  int64_t row = share.first + share.group;
  int lane = int(threadIdx.x) % split.all();
  float2 mine = source.begin_row(row < source.n.count() ? row : 0, lane, split.all());
  if (lane == 0) shared[share.group] = mine;
  __syncwarp();
}

// out[row] = Σ over points and corners of weight · pixel. Points lie in shared memory point by point, row after row.
template <class T, int N, class Source>
__global__ void __launch_bounds__(threads, 8)
    forward(const __grid_constant__ Source source, Split split, const T* map, T* out) {
  ACCEL_SHARED(int4, corners, [warps][at_once]);
  ACCEL_SHARED(float4, parts, [warps][at_once]);
  ACCEL_SHARED(float2, begun, [warps][32]);
  const Rows& n = source.n;
  int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  Share share(split);
  int64_t row = share.first + share.group, rows = n.count();
  int channel = (int(blockIdx.y) * split.lanes + share.sub) * N, stride = n.heads * n.channels;
  bool active = row < rows && channel < n.channels;
  const T* pixels = pixels_of(map, n, row < rows ? row : 0) + channel;
  float sum[N] = {};
  begin_rows(source, share, split, begun[warp]);
  for (int begin = 0; begin < n.points; begin += share.chunk) {
    __syncwarp();  // the points before are used up
    int count = min(share.chunk, n.points - begin);
#pragma unroll 2
    for (int i = lane; i < count * share.rows; i += 32) {
      int point = begin + i / share.rows;
      int64_t of_row = share.first + i % share.rows;
      int4 at = make_int4(-1, -1, -1, -1);
      float4 part = make_float4(0.f, 0.f, 0.f, 0.f);
      if (of_row < rows) {
        Point p = source.point(of_row, point, begun[warp][i % share.rows]);
        Corners c = corners_at(p.y, p.x, p.map, n.pixels);
        float above = p.weight * (1.f - c.down), below = p.weight * c.down;
        at = c.at;
        part = make_float4(above * (1.f - c.right), above * c.right, below * (1.f - c.right), below * c.right);
      }
      corners[warp][i] = at;
      parts[warp][i] = part;
    }
    __syncwarp();
#pragma unroll 2
    for (int point = share.part; point < count; point += split.parts) {
      int4 at = corners[warp][point * share.rows + share.group];
      float4 part = parts[warp][point * share.rows + share.group];
      auto a = Channels<T, N>::load(pixels + int64_t{at.x} * stride, at.x >= 0 && active);
      auto b = Channels<T, N>::load(pixels + int64_t{at.y} * stride, at.y >= 0 && active);
      auto c = Channels<T, N>::load(pixels + int64_t{at.z} * stride, at.z >= 0 && active);
      auto d = Channels<T, N>::load(pixels + int64_t{at.w} * stride, at.w >= 0 && active);
      a.add_to(sum, part.x);
      b.add_to(sum, part.y);
      c.add_to(sum, part.z);
      d.add_to(sum, part.w);
    }
  }
  for (int bits = split.lanes; bits < split.all(); bits *= 2)
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] += __shfl_xor_sync(all_lanes, sum[k], bits);
  if (active && share.part == 0) Channels<T, N>::store(out + row * n.channels + channel, sum);
}

// Gradients of positions and weights: all follow from the four products of the gradient with the corners, which the
// lanes of a group add up in a fixed order. With `Keep` each gradient is then replaced by its weighted sample, of a
// source whose scales are 1, or 0 where the sample is 0 too.
template <class T, int N, bool Keep, class Source>
__global__ void __launch_bounds__(threads, Keep ? 4 : 5)
    backward(const __grid_constant__ Source source, Split split, int tiles, const T* map,
             std::conditional_t<Keep, T*, const T*> grad_out, GradRows strides) {
  ACCEL_SHARED(int4, corners, [warps][at_once]);
  ACCEL_SHARED(float4, parts, [warps][at_once]);
  ACCEL_SHARED(float, results, [3][warps][at_once]);
  ACCEL_SHARED(float2, begun, [warps][32]);
  const Rows& n = source.n;
  int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  Share share(split);
  int64_t row = share.first + share.group, rows = n.count();
  int stride = n.heads * n.channels;
  bool valid = row < rows;
  const T* pixels = pixels_of(map, n, valid ? row : 0);
  auto* grads = grad_out + (valid ? row / n.heads * strides.query + row % n.heads * n.channels : 0);
  bool same = !Keep && tiles == 1 && strides.point == 0;  // one gradient for all points
  float grad[N] = {};
  if (same) Channels<T, N>::load(grads + share.sub * N, valid && share.sub * N < n.channels).widen_to(grad);
  begin_rows(source, share, split, begun[warp]);
  for (int begin = 0; begin < n.points; begin += share.chunk) {
    int count = min(share.chunk, n.points - begin);
#pragma unroll 2
    for (int i = lane; i < count * share.rows; i += 32) {
      int point = begin + i / share.rows;
      int64_t of_row = share.first + i % share.rows;
      int4 at = make_int4(-1, -1, -1, -1);
      float4 part = make_float4(0.f, 0.f, 0.f, 0.f);
      if (of_row < rows) {
        Point p = source.point(of_row, point, begun[warp][i % share.rows]);
        Corners c = corners_at(p.y, p.x, p.map, n.pixels);
        at = c.at;
        part = make_float4(c.down, c.right, p.weight * p.scale_y, p.weight * p.scale_x);
      }
      corners[warp][i] = at;
      parts[warp][i] = part;
    }
    __syncwarp();
    for (int first = 0; first < count; first += split.parts) {
      bool some = first + share.part < count;  // all lanes go on, as they add up together
      int i = some ? (first + share.part) * share.rows + share.group : 0;
      int4 at = some ? corners[warp][i] : make_int4(-1, -1, -1, -1);
      float4 part = parts[warp][i];
      float dot[4] = {};
      for (int tile = 0; tile < tiles; ++tile) {
        int channel = (tile * split.lanes + share.sub) * N;
        bool active = valid && some && channel < n.channels;
        auto* from = grads + (begin + first + share.part) * strides.point + channel;
        if (!same) Channels<T, N>::template load<Keep>(from, active).widen_to(grad);
        Channels<T, N> corner[4] = {
            Channels<T, N>::load(pixels + int64_t{at.x} * stride + channel, at.x >= 0 && active),
            Channels<T, N>::load(pixels + int64_t{at.y} * stride + channel, at.y >= 0 && active),
            Channels<T, N>::load(pixels + int64_t{at.z} * stride + channel, at.z >= 0 && active),
            Channels<T, N>::load(pixels + int64_t{at.w} * stride + channel, at.w >= 0 && active)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float x[N];
          corner[j].widen_to(x);
#pragma unroll
          for (int k = 0; k < N; ++k) dot[j] += grad[k] * x[k];
        }
        if constexpr (Keep) {
          float above = part.z * (1.f - part.x), below = part.z * part.x, sample[N] = {};
          corner[0].add_to(sample, above * (1.f - part.y));
          corner[1].add_to(sample, above * part.y);
          corner[2].add_to(sample, below * (1.f - part.y));
          corner[3].add_to(sample, below * part.y);
          if (active) Channels<T, N>::store(from, sample);
        }
      }
      float down = part.x, right = part.y, up = 1.f - down, left = 1.f - right;
      float weight = up * (left * dot[0] + right * dot[1]) + down * (left * dot[2] + right * dot[3]);
      float y = left * (dot[2] - dot[0]) + right * (dot[3] - dot[1]);
      float x = up * (dot[1] - dot[0]) + down * (dot[3] - dot[2]);
      for (int bits = split.lanes / 2; bits > 0; bits /= 2) {
        weight += __shfl_xor_sync(all_lanes, weight, bits);
        y += __shfl_xor_sync(all_lanes, y, bits);
        x += __shfl_xor_sync(all_lanes, x, bits);
      }
      if (some && share.sub == 0) {
        bool moves = (at.x & at.y & at.z & at.w) != -1;
        results[0][warp][i] = moves ? part.z * y : 0.f;
        results[1][warp][i] = moves ? part.w * x : 0.f;
        results[2][warp][i] = weight;
      }
    }
    __syncwarp();
    for (int i = lane; i < count * share.rows; i += 32) {
      int point = begin + i / share.rows;
      int64_t of_row = share.first + i % share.rows;
      if (of_row < rows)
        source.write(of_row, point, results[0][warp][i], results[1][warp][i], results[2][warp][i]);
    }
  }
}

// The points of a source as samples of the transposed gather: each query sends one row of gradients.
template <class Source>
struct Samples {
  Source source;
  int first;  // image

  __device__ Sample operator()(int image, int head, int i) const {
    const Rows& n = source.n;
    int query = i / n.points, k = i - query * n.points;
    int64_t row = ((int64_t{first} + image) * n.queries + query) * n.heads + head;
    Point p = source.point(row, k, source.begin_row(row, 0, 1));
    return {p.y, p.x, p.weight, p.level, query};
  }
};

}  // namespace points

// --- on the host ---

// One int each for a pixel, a sample of a head, a query beside its level, a stride between pixels, a segment.
inline bool rows_fit(const Rows& n) {
  if (n.batch < 0 || n.queries < 0 || n.points < 0 || n.pixels < 1 || n.heads < 1 || n.channels < 1) return false;
  return n.pixels < (1 << 30) && int64_t{n.queries} * n.points <= int_most &&
         n.queries < (1 << (31 - level_bits)) && int64_t{n.heads} * n.channels <= int_most &&
         int64_t{n.batch} * n.heads <= int_most;
}

template <class T, class Source>
cudaError_t sum_samples(const Source& source, const T* map, T* out, cudaStream_t stream) {
  const Rows& n = source.n;
  if (n.count() == 0) return cudaSuccess;
  auto go = [&](auto kernel, int vector) {
    Groups groups = groups_for(n.channels, vector);
    points::Split split = points::split_for(n, groups.lanes);
    dim3 grid(blocks_for(n.count(), points::threads / split.all()), unsigned(groups.tiles));
    return launch(kernel, grid, dim3(points::threads), 0, stream, source, split, map, out);
  };
  constexpr int vector = vector_size<T>;
  return rows_are_vectors<T>(n.channels, {map, out}) ? go(points::forward<T, vector, Source>, vector)
                                                     : go(points::forward<T, 1, Source>, 1);
}

// `grads` const, or to be replaced by the weighted samples.
template <class T, class Grads, class Source>
cudaError_t grad_points(const Source& source, const T* map, Grads* grads, GradRows strides, cudaStream_t stream) {
  constexpr bool keep = !std::is_const_v<Grads>;
  const Rows& n = source.n;
  if (n.count() == 0 || n.points == 0) return cudaSuccess;
  auto go = [&](auto kernel, int vector) {
    Groups groups = groups_for(n.channels, vector);
    points::Split split = points::split_for(n, groups.lanes);
    dim3 grid(blocks_for(n.count(), points::threads / split.all()));
    return launch(kernel, grid, dim3(points::threads), 0, stream, source, split, groups.tiles, map, grads, strides);
  };
  constexpr int vector = vector_size<T>;
  return rows_are_vectors<T>(n.channels, {map, grads}) ? go(points::backward<T, vector, keep, Source>, vector)
                                                       : go(points::backward<T, 1, keep, Source>, 1);
}

// The gradient of the map, where each query sends one row of grad_out.
template <class T, class Source>
cudaError_t grad_map(const Source& source, Maps maps, const T* grad_out, T* out, void* scratch, int64_t scratch_bytes,
                     cudaStream_t stream) {
  const Rows& n = source.n;
  Segments all{n.batch, n.heads, n.queries * n.points, n.pixels};
  Strides strides{int64_t{n.queries} * n.heads * n.channels, int64_t{n.heads} * n.channels, n.channels};
  return transpose_gather<T>(points::Samples<Source>{source, 0}, maps, all, grad_out, strides, out, n.channels,
                             scratch, scratch_bytes, stream);
}

// run(T{}) for the type that `dtype` says: 0 fp32, 1 bf16, 2 fp16.
template <class Run>
int by_dtype(int dtype, Run run) {
  switch (dtype) {
    case 0: return run(float{});
    case 1: return run(__nv_bfloat16{});
    case 2: return run(__half{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace accel
