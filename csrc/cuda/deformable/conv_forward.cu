// Deformable convolution, forward, in half precision: a matrix product whose left side is gathered straight into the
// registers from which the tensor cores read it.
//
// Each warp owns 16 outputs for every 16 rows of a product. A lane holds 8 neighbouring channels of two of them, so a
// sample is four 16-byte loads, a mean in fp32, one rounding: no column ever lies in memory. That the product then
// counts channels in another order is made good in the weight, which is packed once a call into the blocks that the
// product reads (_product.cuh). A block of threads shares these blocks, so the more outputs it owns, the less often they
// come from the second-level cache; how many fit is a matter of registers.
//
// A step is a tap and 64 channels of one weight and one offset group; taps turn fastest, so that the pixels of a tile
// stay in the first-level cache for all of them. While the tensor cores work on one half of a step the other is gathered.

#include "cuda/deformable/conv_forward.h"

#include "cuda/deformable/gather.cuh"
#include "cuda/_product.cuh"

namespace accel {
namespace {

using product::columns;
using product::depth;

constexpr int strip = 16;  // outputs that stand side by side in the order of tiles

struct Call {
  int height, width, channels, out_channels, out_height, out_width, outputs;  // outputs of an image
  int in_group, out_group, shared, offset_groups;  // channels of a group, and those that share offsets
  int pixel, line;                                 // of input, in vectors of 16 bytes
  unsigned vector;                                 // 16, which the compiler must not know: it would shift and add
  int taps, steps, blocks;                         // steps of a product; 128-column blocks of a group
  int kernel[2], stride[2], padding[2], dilation[2];
  int64_t total;  // outputs of all images
  bool last;      // out is (N, Ho, Wo, O)
  const float* offset;
  const float* mask;
  const float* bias;
};

// The i-th output of an image: strips of columns from left to right, each line by line. So any run of outputs is
// nearly a square, and none is wasted at an edge.
__device__ __forceinline__ int2 output_at(const Call& p, int i) {
  int of_strip = p.out_height * strip, left = i / of_strip * strip, wide = min(strip, p.out_width - left);
  int rest = i - left * p.out_height, y = rest / wide;
  return make_int2(y, left + rest - y * wide);
}

// Tap and slice of channels of a step.
struct Turn {
  int line = 0, column = 0, tap = 0, slice = 0;

  __device__ __forceinline__ void advance(const Call& p) {
    ++tap;
    if (++column < p.kernel[1]) return;
    column = 0;
    if (++line < p.kernel[0]) return;
    line = tap = 0;
    ++slice;
  }
};

struct Shift {
  float y, x, factor;
};

// The four pixels of a sample: the first, in vectors from the beginning of input, though it may be outside; which of
// them count, bit by bit; and of what their weights are made, above and below holding the factor.
struct alignas(16) Spot {
  int at;
  float above, below, right;
};

// One output, as the thread that finds its pixels sees it.
struct Output {
  bool real;
  int y, x;      // position of tap 0, unshifted
  int first;     // pixel of its image, in vectors
  int at, y_at;  // of offset group 0 and tap 0 in the mask, and in the offsets
  int64_t place;  // of output channel 0 in the result, -1 past the last output

  __device__ Output(const Call& p, int64_t i) : real(i < p.total), y(0), x(0), first(0), at(0), y_at(0), place(-1) {
    if (!real) return;
    int image = int(i / p.outputs);
    int2 where = output_at(p, int(i - int64_t{image} * p.outputs));
    y = where.x * p.stride[0] - p.padding[0];
    x = where.y * p.stride[1] - p.padding[1];
    first = image * p.height * p.line;
    int planes = image * p.offset_groups * p.taps * p.outputs, in_plane = where.x * p.out_width + where.y;
    at = planes + in_plane;
    y_at = planes + at;
    place = int64_t{image} * p.outputs * (p.last ? 1 : p.out_channels) + in_plane;
  }

  __device__ __forceinline__ Shift shift(const Call& p, int group, int tap) const {
    if (!real) return {0.f, 0.f, 0.f};
    int plane = (group * p.taps + tap) * p.outputs;
    const float* of_y = p.offset + (y_at + 2 * plane);
    return {__ldg(of_y), __ldg(of_y + p.outputs), p.mask ? __ldg(p.mask + (at + plane)) : 1.f};
  }

  __device__ __forceinline__ Spot spot(const Call& p, const Turn& turn, Shift shift, unsigned& inside) const {
    float down = float(y + turn.line * p.dilation[0]) + shift.y, right = float(x + turn.column * p.dilation[1]) + shift.x;
    inside = 0;
    // no pixel counts where this is false, as it is for NaN
    if (!(real && down >= -1.f && down < float(p.height) && right >= -1.f && right < float(p.width)))
      return {0, 0.f, 0.f, 0.f};
    float top = floorf(down), left = floorf(right);
    int i = int(top), j = int(left);
    unsigned across = (j >= 0 ? 1u : 0u) | (j + 1 < p.width ? 2u : 0u);
    inside = (i >= 0 ? across : 0u) | (i + 1 < p.height ? across << 2 : 0u);
    float below = shift.factor * (down - top);
    return {first + i * p.line + j * p.pixel, shift.factor * (1.f - (down - top)), below, right - left};
  }
};

// A block's `Groups` of four warps, each with M products of 64 outputs and N of 128 columns.
template <class T, int M, int N, int Groups>
struct Tile {
  static constexpr int threads = 128 * Groups, rows = 64 * M * Groups;
  static constexpr int stages = N == 1 ? 4 : 3;
  static constexpr int stage = N * product::block;  // elements
  static constexpr int row = columns + 8;           // of a warp's results in shared memory, apart in their banks
  static constexpr size_t shared = 1024 + sizeof(T) * stages * stage + rows * (3 * (sizeof(Spot) + 1) + 8) + 3 * rows / 4;
  static_assert(Groups * 4 * 16 * row <= stages * stage);
};

// What a lane needs of an output to sample it.
struct Lane {
  int at;
  float part[4];

  __device__ __forceinline__ void read(const Spot& spot) {
    at = spot.at;
    float left = 1.f - spot.right;
    part[0] = spot.above * left;
    part[1] = spot.above * spot.right;
    part[2] = spot.below * left;
    part[3] = spot.below * spot.right;
  }
};

// The means of the pixels of outputs g and g + 8, 8 channels of them, which are those that the lane holds of a: the
// first four are 16 deep of the product, the others the next. `inside` says which pixels count, unless `All` do.
template <class T, bool All>
__device__ __forceinline__ void gather(uint32_t (&a)[2][4], const char* input, const Call& p, const Lane (&lanes)[2],
                                       const uint8_t* inside) {
  Channels<T, 8> pixels[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    unsigned counts = All ? 15u : inside[8 * h];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned at = unsigned(lanes[h].at + (i % 2 ? p.pixel : 0) + (i / 2 ? p.line : 0));
      auto* from = reinterpret_cast<const uint4*>(input + uint64_t{at} * p.vector);
      pixels[h][i] = {All || (counts >> i & 1) ? __ldg(from) : make_uint4(0, 0, 0, 0)};
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float mean[8];
    pixels[h][0].widen_to(mean);
#pragma unroll
    for (int i = 0; i < 8; ++i) mean[i] *= lanes[h].part[0];
#pragma unroll
    for (int i = 1; i < 4; ++i) pixels[h][i].add_to(mean, lanes[h].part[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i / 2][i % 2 * 2 + h] = pair_of<T>(mean[2 * i], mean[2 * i + 1]);
  }
}

template <class T, int M, int N, int Groups>
__global__ void __launch_bounds__(128 * Groups, 1)
    convolve(const __grid_constant__ Call p, const T* input, const T* packed, T* out) {
  using Its = Tile<T, M, N, Groups>;
  constexpr int rows = Its::rows, stages = Its::stages;
  ACCEL_DYNAMIC_SHARED(unsigned char, raw);
  auto* memory = raw + (1024 - reinterpret_cast<uintptr_t>(raw) % 1024) % 1024;
  auto* weights = reinterpret_cast<T*>(memory);                              // [stages][N][block]
  auto* spots = reinterpret_cast<Spot*>(weights + stages * Its::stage);      // [3][rows]
  auto* places = reinterpret_cast<int64_t*>(spots + 3 * rows);               // [rows]
  auto* whole = reinterpret_cast<int*>(places + rows);                       // [3][rows / 16]: all their pixels count
  auto* insides = reinterpret_cast<uint8_t*>(whole + 3 * rows / 16);         // [3][rows]

  int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int block = int(blockIdx.x) % (p.blocks / N) * N, rest = int(blockIdx.x) / (p.blocks / N);
  int groups = p.channels / p.in_group, group = rest % groups;
  int64_t first = int64_t{rest / groups} * rows;
  const T* source = packed + (int64_t{group} * p.blocks + block) * p.steps * product::block + 8 * thread;
  auto fetch = [&](int step) {  // this thread's share of its weights
    if (step < p.steps) {
      T* to = weights + step % stages * Its::stage + 8 * thread;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < product::block; i += 8 * Its::threads)
          if (product::block % (8 * Its::threads) == 0 || i + 8 * thread < product::block)
            cp_async16(to + n * product::block + i, source + int64_t{n} * p.steps * product::block + i);
      source += product::block;
    }
    cp_async_commit();
  };
  bool finds = thread < rows;
  Output output(p, finds ? first + thread : p.total);
  auto channel_of = [&](int slice) { return group * p.in_group + slice * depth; };
  auto shift_of = [&](int step, const Turn& turn) {
    if (!finds || step >= p.steps) return Shift{0.f, 0.f, 0.f};
    return output.shift(p, p.offset_groups > 1 ? channel_of(turn.slice) / p.shared : 0, turn.tap);
  };
  auto find = [&](int step, const Turn& turn, Shift shift) {
    if (!finds || step >= p.steps) return;
    unsigned inside;
    Spot spot = output.spot(p, turn, shift, inside);
    int to = step % 3 * rows + thread;
    spots[to] = spot;
    insides[to] = uint8_t(inside);
    unsigned all = __ballot_sync(all_lanes, inside == 15u);
    if (lane % 16 == 0) whole[to / 16] = (all >> lane & 0xffff) == 0xffff;
  };
  int mine = warp / 4 * 64 * M + warp % 4 * 16;
  uint32_t a[2][M][2][4];
  Lane held[M][2];
  auto sample = [&](int step, int slice, int half) {
    auto* from = reinterpret_cast<const char*>(input + channel_of(slice) + 32 * half + 8 * (lane % 4));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      int first = step % 3 * rows + mine + 64 * m;
      if (half == 0 || M > 1) {
        held[m][0].read(spots[first + lane / 4]);
        held[m][1].read(spots[first + lane / 4 + 8]);
      }
      if (whole[first / 16])
        gather<T, true>(a[half][m], from, p, held[m], nullptr);
      else
        gather<T, false>(a[half][m], from, p, held[m], insides + first + lane / 4);
    }
  };
  product::Sum sums[M][N];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < columns / 2; ++i) sums[m][n][i / 4][i % 4] = 0.f;
  auto multiply = [&](int step, int half) {
    const T* b = weights + step % stages * Its::stage;
    product::begin();
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
          product::add<T>(sums[m][n], a[half][m][k], b + n * product::block, 2 * half + k);
    product::commit();
  };

  if (finds) places[thread] = output.place;
#pragma unroll
  for (int step = 0; step < stages - 1; ++step) fetch(step);
  Turn turn;               // of the step whose shifts are on their way
  int slice = 0, next = 0;  // of the step, and of the one after it
  find(0, turn, shift_of(0, turn));
  turn.advance(p);
  next = turn.slice;
  find(1, turn, shift_of(1, turn));
  turn.advance(p);
  Shift ahead = shift_of(2, turn);
  __syncthreads();
  sample(0, slice, 0);
  for (int step = 0; step < p.steps; ++step) {
    cp_async_wait<stages - 2>();
    product::publish();
    __syncthreads();  // this step's weights and the next one's pixels are there, the last step's are no longer needed
    fetch(step + stages - 1);
    multiply(step, 0);
    find(step + 2, turn, ahead);
    int after_next = turn.slice;
    turn.advance(p);
    ahead = shift_of(step + 3, turn);
    sample(step, slice, 1);
    multiply(step, 1);
    product::wait<1>();
    if (step + 1 < p.steps) sample(step + 1, next, 0);
    product::wait<0>();
    slice = next;
    next = after_next;
  }
  cp_async_wait<0>();
  __syncthreads();  // shared memory is free for the results

  T* results = weights + warp * 16 * Its::row;
  int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n) {
      product::settle(sums[m][n]);
      int o0 = (block + n) * columns, o1 = min(columns, p.out_group - o0);  // o1: how many there are
      const float* bias = p.bias ? p.bias + group * p.out_group + o0 : nullptr;
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
        int column = 8 * j + 2 * t;
        float b0 = bias && column < o1 ? __ldg(bias + column) : 0.f;
        float b1 = bias && column + 1 < o1 ? __ldg(bias + column + 1) : 0.f;
#pragma unroll
        for (int h = 0; h < 2; ++h)
          *reinterpret_cast<unsigned*>(results + (g + 8 * h) * Its::row + column) =
              pair_of<T>(sums[m][n][j][2 * h] + b0, sums[m][n][j][2 * h + 1] + b1);
      }
      __syncwarp();
      const int64_t* place = places + warp / 4 * 64 * M + 64 * m + warp % 4 * 16;
      int64_t o = group * p.out_group + o0;
      if (p.last) {
        for (int i = lane; i < 16 * columns / 8; i += 32) {
          int row = i / (columns / 8), column = i % (columns / 8) * 8;
          if (place[row] >= 0 && column < o1)
            *reinterpret_cast<uint4*>(out + place[row] * p.out_channels + o + column) =
                *reinterpret_cast<const uint4*>(results + row * Its::row + column);
        }
      } else if (place[lane % 16] >= 0) {
        T* to = out + place[lane % 16] + o * p.outputs;
        for (int column = lane / 16; column < o1; column += 2)
          to[int64_t{column} * p.outputs] = results[lane % 16 * Its::row + column];
      }
      __syncwarp();
    }
}

// The weight in the blocks of the product: block (group, 128 outputs, step). A thread makes 16 bytes.
template <class T>
__global__ void __launch_bounds__(256) pack(const __grid_constant__ Call p, const T* weight, T* packed, int64_t parts) {
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= parts) return;
  int tap = int(i % p.taps);  // neighbours in memory
  int64_t rest = i / p.taps;
  int part = int(rest % (depth / 8)), slices = p.in_group / depth;
  rest /= depth / 8;
  int slice = int(rest % slices);
  rest /= slices;
  int n = int(rest % columns);
  int64_t block = rest / columns;  // and group
  int o = int(block % p.blocks) * columns + n;
  // parts 0 and 1 are one 16 deep: of lane t the channels 8·t and on, four of them; parts 2 and 3 the other four
  int channel = slice * depth + part / 4 * 32 + part % 4 * 2;
  union {
    T elements[8];
    uint4 all;
  } made;
  made.all = make_uint4(0, 0, 0, 0);
  if (o < p.out_group) {
    int64_t from = ((block / p.blocks * p.out_group + o) * p.in_group + channel) * p.taps + tap;
#pragma unroll
    for (int e = 0; e < 8; ++e) made.elements[e] = weight[from + int64_t{e / 2 * 8 + e % 2} * p.taps];
  }
  T* to = packed + (block * p.steps + slice * p.taps + tap) * product::block + product::place(n, part);
  *reinterpret_cast<uint4*>(to) = made.all;
}

bool read(const DeformConv2dForward& p, Call& call) {
  int64_t pixels = int64_t{p.height} * p.width, outputs = int64_t{p.out_height} * p.out_width;
  int64_t taps = int64_t{p.kernel[0]} * p.kernel[1];
  if (p.batch < 0 || pixels < 1 || outputs < 1 || taps < 1 || p.channels < 1 || p.out_channels < 1) return false;
  if (p.groups < 1 || p.offset_groups < 1 || p.channels % p.groups || p.out_channels % p.groups) return false;
  if (p.channels % p.offset_groups) return false;
  int in_group = p.channels / p.groups, out_group = p.out_channels / p.groups;
  int shared = p.channels / p.offset_groups;
  if (in_group % depth || shared % depth || out_group % 8) return false;
  int64_t steps = in_group / depth * taps;
  int64_t images = max(p.batch, 1), vectors = p.channels / 8;
  if (outputs > int_most || steps > int_most || 2 * p.offset_groups * taps * outputs > int_most / images) return false;
  if ((pixels + p.width) * vectors > int_most / images) return false;  // and a line above or below
  if (p.height + 2 * int64_t{p.padding[0]} > int_most || p.width + 2 * int64_t{p.padding[1]} > int_most) return false;
  call = {p.height, p.width, p.channels, p.out_channels, p.out_height, p.out_width, int(outputs),
          in_group, out_group, shared, p.offset_groups, p.channels / 8, p.width * (p.channels / 8), 16u,
          int(taps), int(steps), (out_group + columns - 1) / columns, {p.kernel[0], p.kernel[1]},
          {p.stride[0], p.stride[1]}, {p.padding[0], p.padding[1]}, {p.dilation[0], p.dilation[1]},
          p.batch * outputs, p.last != 0, p.offset, p.mask, p.bias};
  return true;
}

int64_t packed_elements(const Call& call) {
  return int64_t{call.channels / call.in_group} * call.blocks * call.steps * product::block;
}

template <class T, int M, int N, int Groups>
cudaError_t run(const Call& call, const T* input, const T* packed, T* out, cudaStream_t stream) {
  using Its = Tile<T, M, N, Groups>;
  int64_t tiles = (call.total + Its::rows - 1) / Its::rows * (call.channels / call.in_group);
  unsigned grid = blocks_for(tiles * (call.blocks / N), 1);
  return launch(convolve<T, M, N, Groups>, dim3(grid), dim3(Its::threads), Its::shared, stream, call, input, packed, out);
}

// A tile, and how long it takes for each output and column: more columns share what is gathered, more outputs the
// weights that are fetched.
template <class T>
struct Kind {
  int outputs, blocks;
  size_t shared;
  float cost;
  cudaError_t (*run)(const Call&, const T* input, const T* packed, T* out, cudaStream_t);
};
template <class T, int M, int N, int Groups>
constexpr Kind<T> kind(float cost) {
  using Its = Tile<T, M, N, Groups>;
  return {Its::rows, N, Its::shared, cost, run<T, M, N, Groups>};
}
template <class T>
constexpr Kind<T> kinds[] = {kind<T, 2, 1, 2>(1.f), kind<T, 1, 2, 2>(.9f), kind<T, 1, 1, 3>(1.05f),
                             kind<T, 1, 1, 2>(1.2f), kind<T, 1, 1, 1>(1.3f)};

// The kind asked for, or the fastest; null if none can be had.
template <class T>
const Kind<T>* choose(const DeformConv2dForward& p, const Call& call) {
  const Kind<T>* best = nullptr;
  int processors = max(p.processors, 1);
  float least = 0.f;
  for (const Kind<T>& kind : kinds<T>) {
    if (call.blocks % kind.blocks || kind.shared > size_t(p.shared)) continue;
    if (p.tile && p.tile != 1 + int(&kind - kinds<T>)) continue;
    int64_t tiles = (call.total + kind.outputs - 1) / kind.outputs * (call.blocks / kind.blocks) *
                    (call.channels / call.in_group);
    float time = float((tiles + processors - 1) / processors) * float(kind.outputs * kind.blocks) * kind.cost;
    if (best && time >= least) continue;
    best = &kind;
    least = time;
  }
  return best;
}

template <class T>
cudaError_t forward(const DeformConv2dForward& p, const Call& call, cudaStream_t stream) {
  auto* input = static_cast<const T*>(p.input);
  auto* packed = static_cast<T*>(p.packed);
  auto* out = static_cast<T*>(p.out);
  if (call.total == 0) return cudaSuccess;
  const Kind<T>* kind = choose<T>(p, call);
  if (!kind) return cudaErrorInvalidValue;
  int64_t parts = packed_elements(call) / 8;
  cudaError_t error = launch(pack<T>, dim3(blocks_for(parts, 256)), dim3(256), 0, stream, call,
                             static_cast<const T*>(p.weight), packed, parts);
  if (error != cudaSuccess) return error;
  return kind->run(call, input, packed, out, stream);
}

}  // namespace
}  // namespace accel

extern "C" int accel_deform_conv2d_forward(const accel::DeformConv2dForward* p, void* stream) {
  accel::Call call;
  if (!accel::read(*p, call)) return cudaErrorInvalidValue;
  if (p->dtype == 1) return accel::forward<__nv_bfloat16>(*p, call, cudaStream_t(stream));
  if (p->dtype == 2) return accel::forward<__half>(*p, call, cudaStream_t(stream));
  return cudaErrorInvalidValue;
}

extern "C" int64_t accel_deform_conv2d_packed(const accel::DeformConv2dForward* p) {
  accel::Call call;
  return accel::read(*p, call) ? accel::packed_elements(call) : -1;
}
