// The transpose of a bilinear gather, without atomics: every pixel sums what the samples around it send back.
//
// A sample (a position, a weight, a row of gradients) touches four pixels, of which the first inside the map is its
// anchor. Samples of a segment (an image and a head or group) are sorted by anchor, stably, so that the samples near a
// pixel stand in two runs: those anchored at it or left of it, and the same one pixel up. The pixel goes through both
// in order. Every sum has one order, so results are the same bits every time.
//
// Memory: 24 bytes a sample, 4 bytes a pixel and segment, and 1 KB for each 8192 samples of a long segment. Sorting all
// four corners instead would take four times as much; sorting samples and reading each four times takes none of it, as
// neighbouring pixels, which share samples, are in one block and its cache.
#pragma once

#include "cuda/deformable/gather.cuh"
#include "cuda/_sort.cuh"

namespace accel {

// What an op says of one sample: where it is on which map, its weight, and which row of gradients it sends.
struct Sample {
  float y, x, weight;
  int level, row;
};

// Where the row of gradients of a sample begins: batch·image + row·row + group·group, in elements.
struct Strides {
  int64_t batch, row, group;
};

// The segments of a pass: `groups` to an image, `samples` of each.
struct Segments {
  int images, groups, samples, pixels;
  __host__ __device__ int count() const { return images * groups; }
};

namespace transpose {

struct alignas(16) Entry {
  float y, x, weight;
  unsigned row;  // and the level, in the lowest bits
};

// keys: each sample's anchor, or `pixels` if it touches none.
template <class Source>
__global__ void __launch_bounds__(256)
    locate(const __grid_constant__ Source source, const __grid_constant__ Maps maps, Segments all, uint32_t* keys) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= all.samples) return;
  for (int segment = int(blockIdx.y); segment < all.count(); segment += int(gridDim.y)) {
    Sample s = source(segment / all.groups, segment % all.groups, i);
    Map map = read_map(maps, s.level);
    keys[int64_t{segment} * all.samples + i] = uint32_t(corners_at(s.y, s.x, map, maps.pixels).anchor);
  }
}

// The sorted samples with all that the pixels need of them, and begins (segments, pixels + 1): where the samples of an
// anchor begin.
template <class Source>
__global__ void __launch_bounds__(256)
    index(const __grid_constant__ Source source, Segments all, Pairs sorted, Entry* entries, int* begins) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  for (int segment = int(blockIdx.y); segment < all.count(); segment += int(gridDim.y)) {
    int64_t first = int64_t{segment} * all.samples;
    if (i < all.samples) {
      Sample s = source(segment / all.groups, segment % all.groups, sorted.ids[first + i]);
      entries[first + i] = {s.y, s.x, s.weight, unsigned(s.row) << level_bits | unsigned(s.level)};
    }
    if (i <= all.pixels) {
      int low = 0, high = all.samples;
      while (low < high) {
        int middle = low + (high - low) / 2;
        if (sorted.keys[first + middle] < uint32_t(i))
          low = middle + 1;
        else
          high = middle;
      }
      begins[int64_t{segment} * (all.pixels + 1) + i] = low;
    }
  }
}

// Two runs of samples as one list.
struct Runs {
  const Entry* first;
  const Entry* second;
  int split, count;
};

struct Target {
  int y, x, level;
};

// Adds the samples `from`, `from + step`, ... below `stop` of the list to a pixel, N channels of it.
template <class T, int N>
__device__ __forceinline__ void add_samples(const Runs& runs, Target to, int from, int step, int stop, const T* grads,
                                            int64_t row_stride, bool active, float (&sum)[N]) {
#pragma unroll 4
  for (int j = from; j < stop; j += step) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(j < runs.split ? runs.first + j : runs.second + (j - runs.split)));
    float dy = __uint_as_float(raw.x) - float(to.y), dx = __uint_as_float(raw.y) - float(to.x);
    bool touches = dy > -1.f && dy < 1.f && dx > -1.f && dx < 1.f && int(raw.w & (max_levels - 1)) == to.level;
    float weight = __uint_as_float(raw.z) * ((1.f - fabsf(dy)) * (1.f - fabsf(dx)));
    auto got = Channels<T, N>::load(grads + int64_t(raw.w >> level_bits) * row_stride, touches && active);
    got.add_to(sum, touches ? weight : 0.f);
  }
}

constexpr int alone = 32;  // samples that a group takes by itself; the whole warp helps with more

// out (images, pixels, groups, channels). A group of lanes owns a pixel; long lists, which small maps and gathering
// samples bring, are then shared out to all groups of the warp and their sums added in a fixed order.
template <class T, int N>
__global__ void __launch_bounds__(256, 3)
    collect(const __grid_constant__ Maps maps, Segments all, int lanes, const Entry* entries, const int* begins,
            const T* grads, Strides strides, T* out, int channels) {
  int lane = int(threadIdx.x) % 32, groups = 32 / lanes, sub = lane % lanes, group = lane / lanes;
  int64_t item = (int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32) * groups + group;
  int64_t total = int64_t{all.count()} * all.pixels;
  bool valid = item < total;
  int segment = valid ? int(item / all.pixels) : 0, pixel = valid ? int(item - int64_t{segment} * all.pixels) : 0;
  int channel = (int(blockIdx.y) * lanes + sub) * N;
  bool active = channel < channels;
  const int* begin = begins + int64_t{segment} * (all.pixels + 1);
  auto grads_of = [&](int of_segment) {
    return grads + (of_segment / all.groups) * strides.batch + (of_segment % all.groups) * strides.group + channel;
  };
  float sum[N] = {};
  for (int level = 0; level < maps.levels; ++level) {
    Map map = read_map(maps, level);
    int64_t at = int64_t{pixel} - map.start;
    Runs runs{entries, entries, 0, 0};
    Target to{0, 0, level};
    if (valid && at >= 0 && at < int64_t{map.height} * map.width) {
      to.y = int(at) / map.width;
      to.x = int(at) - to.y * map.width;
      int left = to.x > 0, up = pixel - map.width;
      const Entry* mine = entries + int64_t{segment} * all.samples;
      int a = begin[pixel - left], b = to.y > 0 ? begin[up - left] : 0;
      runs = {mine + a, mine + b, begin[pixel + 1] - a, 0};
      runs.count = runs.split + (to.y > 0 ? begin[up + 1] - b : 0);
    }
    add_samples(runs, to, 0, 1, min(runs.count, alone), grads_of(segment), strides.row, active, sum);
    for (unsigned long_ = __ballot_sync(all_lanes, sub == 0 && runs.count > alone); long_; long_ &= long_ - 1) {
      int owner = __ffs(int(long_)) - 1;
      auto of_owner = [&](auto x) { return __shfl_sync(all_lanes, x, owner); };
      Runs shared{reinterpret_cast<const Entry*>(of_owner(reinterpret_cast<uint64_t>(runs.first))),
                  reinterpret_cast<const Entry*>(of_owner(reinterpret_cast<uint64_t>(runs.second))),
                  of_owner(runs.split), of_owner(runs.count)};
      Target there{of_owner(to.y), of_owner(to.x), level};
      float part[N] = {};
      add_samples(shared, there, alone + group, groups, shared.count, grads_of(of_owner(segment)), strides.row, active,
                  part);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        for (int bits = lanes; bits < 32; bits *= 2) part[k] += __shfl_xor_sync(all_lanes, part[k], bits);
        if (owner / lanes == group) sum[k] += part[k];
      }
    }
  }
  if (valid && active) {
    int64_t pixel_row = (int64_t{segment / all.groups} * all.pixels + pixel) * all.groups + segment % all.groups;
    Channels<T, N>::store(out + pixel_row * channels + channel, sum);
  }
}

}  // namespace transpose

// --- the whole, on the host ---

inline int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Scratch memory for one image.
inline int64_t transpose_scratch(int groups, int samples, int pixels) {
  int64_t all = int64_t{groups} * samples;
  return 2 * round_up(4 * all) + round_up(16 * all) + round_up(4 * int64_t{groups} * (pixels + 1)) +
         round_up(sort_scratch(groups, samples));
}

// grad (images, pixels, groups, channels) of a gather whose samples `source` gives. Images that do not fit into the
// scratch memory together are done one after another, `source.first` being the first of them.
template <class T, class Source>
cudaError_t transpose_gather(const Source& source, Maps maps, Segments all, const T* grads, Strides strides, T* out,
                             int channels, void* scratch, int64_t scratch_bytes, cudaStream_t stream) {
  using transpose::Entry;
  if (all.images == 0) return cudaSuccess;
  int64_t each = transpose_scratch(all.groups, all.samples, all.pixels);
  if (each > scratch_bytes) return cudaErrorInvalidValue;
  int at_once = int(min(scratch_bytes / each, int64_t{all.images}));
  for (int image = 0; image < all.images; image += at_once) {
    Segments now{min(at_once, all.images - image), all.groups, all.samples, all.pixels};
    int64_t count = int64_t{now.count()} * now.samples;
    auto* free = static_cast<char*>(scratch);
    auto take = [&](int64_t bytes) { return free += round_up(bytes), free - round_up(bytes); };
    Pairs a{reinterpret_cast<uint32_t*>(take(4 * count)), reinterpret_cast<int*>(take(4 * count))};
    auto* entries = reinterpret_cast<Entry*>(take(16 * count));
    Pairs b{reinterpret_cast<uint32_t*>(entries), reinterpret_cast<int*>(entries) + count};  // done with before entries
    auto* begins = reinterpret_cast<int*>(take(4 * int64_t{now.count()} * (now.pixels + 1)));
    auto* counts = reinterpret_cast<int*>(free);

    uint32_t largest = uint32_t(now.pixels);
    dim3 rows(1, unsigned(min(now.count(), 65535)));
    Source here = source;
    here.first = image;
    cudaError_t error = cudaSuccess;
    if (now.samples > 0) {
      rows.x = blocks_for(now.samples, 256);
      error = launch(transpose::locate<Source>, rows, dim3(256), 0, stream, here, maps, now, sort_input(a, b, largest));
      if (error == cudaSuccess) error = sort_segments(a, b, now.count(), now.samples, largest, counts, stream);
    }
    rows.x = blocks_for(max(now.samples, now.pixels + 1), 256);
    if (error == cudaSuccess)
      error = launch(transpose::index<Source>, rows, dim3(256), 0, stream, here, now, a, entries, begins);
    if (error != cudaSuccess) return error;

    const T* grads_now = grads + image * strides.batch;
    T* out_now = out + int64_t{image} * all.pixels * all.groups * channels;
    auto collect = [&](auto kernel, int vector) {
      Groups shape = groups_for(channels, vector);
      dim3 grid(blocks_for(int64_t{now.count()} * now.pixels, 256 / shape.lanes), unsigned(shape.tiles));
      return launch(kernel, grid, dim3(256), 0, stream, maps, now, shape.lanes, entries, begins, grads_now, strides,
                    out_now, channels);
    };
    bool vectors = rows_are_vectors<T>(channels, {grads_now, out_now}) && strides.batch % vector_size<T> == 0 &&
                   strides.row % vector_size<T> == 0 && strides.group % vector_size<T> == 0;
    error = vectors ? collect(transpose::collect<T, vector_size<T>>, vector_size<T>)
                    : collect(transpose::collect<T, 1>, 1);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace accel
