// torch ops accel_native::deform_conv2d_{forward,backward}: checks, allocation, threads. accel/ops/deformable/deform_conv2d.py is
// the only caller and the place where the op is defined.

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/_binding.h"
#include "params.h"

namespace accel::deform_conv2d {
namespace {

// Bytes of scratch memory a call may hold beside its arguments and results, where sizes leave the choice.
constexpr int64_t IMAGES_AT_ONCE = 8 << 20, SPOTS_AT_ONCE = 6 << 20;

Map map_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, name, " must be a 4-D CPU tensor");
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  void* data = const_cast<void*>(x.const_data_ptr());
  if (x.is_contiguous()) return {data, channels * pixels, pixels, 1};
  const bool last = (x.stride(1) == 1 || channels == 1) && (x.stride(3) == channels || x.size(3) == 1) &&
                    (x.stride(2) == channels * x.size(3) || x.size(2) == 1) &&
                    (x.stride(0) == channels * pixels || x.size(0) == 1);
  STD_TORCH_CHECK(last, name, " must be contiguous or channels_last");
  return {data, channels * pixels, 1, channels};
}

// A result of (N, C, H, W) in the layout of `like`.
Tensor allocate(const Tensor& like, const Map& map, int64_t images, int64_t channels, int64_t height, int64_t width) {
  const bool last = map.channel == 1 && map.pixel != 1;
  const auto format = last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  // no transposed view: autograd forbids to change one in place
  return torch::stable::empty({images, channels, height, width}, like.scalar_type(), std::nullopt, like.device(),
                              std::nullopt, format);
}

void check_floats(const OptionalTensor& x, const char* name, int64_t count) {
  STD_TORCH_CHECK(!x || x->is_contiguous(), name, " must be contiguous");
  check_f32(x, name, count);
}

Params describe(const Tensor& input, const Tensor& offset, const Tensor& weight, const OptionalTensor& bias,
                const OptionalTensor& mask, const Ints& stride, const Ints& padding, const Ints& dilation,
                bool border_gradient) {
  Params p{};
  p.border_gradient = border_gradient;
  p.input = map_of(input, "input");
  p.dtype = dtype_of(input, "deform_conv2d takes");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "stride, padding, dilation are pairs");
  check_cpu(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0 && weight.scalar_type() == input.scalar_type(),
                  "weight must be (O, C/g, kh, kw) in the dtype of input");
  p.batch = input.size(0), p.channels = input.size(1), p.height = input.size(2), p.width = input.size(3);
  p.out_channels = weight.size(0);
  STD_TORCH_CHECK(p.channels > 0 && p.channels % weight.size(1) == 0, "weight does not fit the input's channels");
  p.groups = p.channels / weight.size(1);
  STD_TORCH_CHECK(p.out_channels % p.groups == 0, "weight groups must divide the output channels");
  const int64_t size[2] = {p.height, p.width};
  int64_t out[2];
  for (size_t i = 0; i < 2; ++i) {
    p.kernel[i] = weight.size(int64_t(i) + 2);
    p.stride[i] = stride[i], p.padding[i] = padding[i], p.dilation[i] = dilation[i];
    STD_TORCH_CHECK(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, "stride and dilation must be positive");
    const int64_t room = size[i] + 2 * padding[i] - dilation[i] * (p.kernel[i] - 1) - 1;
    STD_TORCH_CHECK(size[i] > 0 && room >= 0, "the output would be empty");
    out[i] = room / stride[i] + 1;
  }
  p.out_h = out[0], p.out_w = out[1];
  // pixels and positions are counted in 32 bits
  STD_TORCH_CHECK(p.pixels() < std::numeric_limits<int32_t>::max() - 1 && p.outputs() < (1 << 30), "the map is too large");
  check_cpu(offset, "offset");
  STD_TORCH_CHECK(offset.dim() == 4 && offset.size(1) > 0 && offset.size(1) % (2 * p.taps()) == 0, "offset must be 4-D");
  p.offset_groups = offset.size(1) / (2 * p.taps());
  STD_TORCH_CHECK(p.channels % p.offset_groups == 0, "offset groups must divide the channels");
  const int64_t spots = p.batch * p.offset_groups * p.taps() * p.outputs();
  check_floats(offset, "offset", 2 * spots);
  check_floats(mask, "mask", spots);
  check_floats(bias, "bias", p.out_channels);
  p.offset = static_cast<const float*>(offset.const_data_ptr());
  p.mask = data_or_null(mask);
  p.bias = data_or_null(bias);
  p.weight = weight.const_data_ptr();
  return p;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename F>
void in_parallel(int64_t tasks, F f) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t from, int64_t to) { f(from, to); });
}

Tensor floats(const Tensor& like, Ints shape) { return torch::stable::new_empty(like, shape, ScalarType::Float); }

Tensor forward(Tensor input, Tensor offset, Tensor weight, OptionalTensor bias, OptionalTensor mask, Ints stride,
               Ints padding, Ints dilation, bool border_gradient) {
  ForwardParams f{};
  f.p = describe(input, offset, weight, bias, mask, stride, padding, dilation, border_gradient);
  Params& p = f.p;
  Tensor out = allocate(input, p.input, p.batch, p.out_channels, p.out_h, p.out_w);
  p.out = map_of(out, "out");
  if (p.batch == 0) return out;

  Tensor words = floats(input, {ACCEL_LEVEL(deform::weight_words)(p)});
  f.weight = mutable_floats(words);
  const auto pack = ACCEL_LEVEL(deform::pack_weight);
  in_parallel(p.groups * ceil_div(p.out_group(), PANEL), [&](int64_t from, int64_t to) { pack(f, from, to); });

  // channels are read in vectors, which must not reach across a group's end
  constexpr int64_t V = LEAST_CHUNK;
  f.packed = p.input.channel != 1 || p.in_group() % V || p.channels / p.offset_groups % V;
  f.row = ceil_div(p.channels, V) * V;
  const int64_t bytes = image_size(f) * (p.dtype == Dtype::f32 ? 4 : 2);
  const int64_t together = std::clamp<int64_t>(IMAGES_AT_ONCE / bytes, 1, p.batch);
  Tensor images = torch::stable::new_empty(input, {f.packed ? together * image_size(f) : 0});
  f.image = images.mutable_data_ptr();

  // Tiles that keep their outputs in the second-level cache, as many for every thread: which tile an output falls into
  // does not change it.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rows = std::clamp<int64_t>(65536 / p.out_channels, 32, 192);
  for (f.first_image = 0; f.first_image < p.batch; f.first_image += together) {
    f.images = std::min(together, p.batch - f.first_image);
    int64_t tiles = ceil_div(f.images * ceil_div(p.outputs(), rows), threads) * threads;
    f.tiles = std::min(ceil_div(tiles, f.images), p.outputs());
    f.tile = ceil_div(p.outputs(), f.tiles);
    if (f.packed) {
      const auto pack = ACCEL_LEVEL(deform::pack_image);
      in_parallel(f.images * ceil_div(p.pixels(), PIXELS_OF_TASK), [&](int64_t from, int64_t to) { pack(f, from, to); });
    }
    const auto run = ACCEL_LEVEL(deform::forward);
    in_parallel(f.images * f.tiles, [&](int64_t from, int64_t to) { run(f, from, to); });
  }
  return out;
}

// Channels a backward task owns: few enough that its map, its weight and its gradients of both stay in the cache, all of
// one weight group and one offset group. Follows from shapes alone, as every sum's order does.
std::vector<Chunk> cut_chunks(const Params& p, int64_t* width) {
  const int64_t map = p.pixels() * 4, weight = p.out_group() * p.taps() * 4;
  int64_t most = 64;
  while (most > LEAST_CHUNK && (most * map > (4400 << 10) || most * weight > (640 << 10))) most /= 2;
  const int64_t shared = p.channels / p.offset_groups;
  std::vector<Chunk> chunks;
  *width = 0;
  for (int64_t c = 0; c < p.channels;) {
    const int64_t count = std::min({(c / p.in_group() + 1) * p.in_group() - c, (c / shared + 1) * shared - c, most});
    chunks.push_back({c, count});
    *width = std::max(*width, ceil_div(count, LEAST_CHUNK) * LEAST_CHUNK);
    c += count;
  }
  return chunks;
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Grads backward(Tensor grad_out, Tensor input, Tensor offset, Tensor weight, OptionalTensor bias, OptionalTensor mask,
               Ints stride, Ints padding, Ints dilation, bool border_gradient, Bools needs) {
  BackwardParams b{};
  b.p = describe(input, offset, weight, bias, mask, stride, padding, dilation, border_gradient);
  Params& p = b.p;
  STD_TORCH_CHECK(needs.size() == 5, "needs must say something of each of five tensors");
  STD_TORCH_CHECK(grad_out.dim() == 4 && grad_out.size(0) == p.batch && grad_out.size(1) == p.out_channels &&
                      grad_out.size(2) == p.out_h && grad_out.size(3) == p.out_w &&
                      grad_out.scalar_type() == input.scalar_type(),
                  "grad_out must have the shape and dtype of the output");
  b.grad_out = map_of(grad_out, "grad_out");
  const bool want_bias = needs[3] && bias, want_mask = needs[4] && mask, want_spots = needs[1] || want_mask;
  b.want_input = needs[0];
  const int64_t taps = p.taps(), outputs = p.outputs();
  Tensor grad_input = needs[0] ? allocate(input, p.input, p.batch, p.channels, p.height, p.width)
                               : torch::stable::new_empty(input, {0});
  if (needs[0]) b.grad_input = map_of(grad_input, "grad_input");
  Ints spots_shape{p.batch, 2 * p.offset_groups * taps, p.out_h, p.out_w};
  Tensor grad_offset = floats(input, needs[1] ? spots_shape : Ints{0});
  spots_shape[1] /= 2;
  Tensor grad_mask = floats(input, want_mask ? spots_shape : Ints{0});
  Tensor grad_bias = floats(input, {want_bias ? p.out_channels : 0});
  Tensor grad_weight = torch::stable::new_empty(
      input, needs[2] ? Ints{p.out_channels, p.in_group(), p.kernel[0], p.kernel[1]} : Ints{0});
  b.grad_offset = needs[1] ? mutable_floats(grad_offset) : nullptr;
  b.grad_mask = want_mask ? mutable_floats(grad_mask) : nullptr;
  b.weight_result = grad_weight.mutable_data_ptr();
  b.grad_bias = mutable_floats(grad_bias);

  const std::vector<Chunk> chunks = cut_chunks(p, &b.width);
  b.chunks = chunks.data();
  b.chunk_count = int64_t(chunks.size());
  const int64_t slice = p.out_group() * taps * b.width;
  Tensor sums = floats(input, {needs[2] ? b.chunk_count * slice : 0});
  if (needs[2]) {
    torch::stable::zero_(sums);
    b.grad_weight = mutable_floats(sums);
  }

  // Rounds of as many chunks and images as the parts of offset gradients have room for, images inside chunks.
  const int64_t spots = 3 * taps * outputs, room = std::max<int64_t>(SPOTS_AT_ONCE / (spots * 4), 1);
  const int64_t at_once = want_spots ? std::min<int64_t>(b.chunk_count, std::max<int64_t>(room, 8)) : b.chunk_count;
  const int64_t together = want_spots ? std::clamp<int64_t>(room / at_once, 1, std::max<int64_t>(p.batch, 1)) : p.batch;
  Tensor parts = floats(input, {want_spots && p.batch ? at_once * together * spots : 0});
  b.spots = want_spots ? mutable_floats(parts) : nullptr;
  const auto run = ACCEL_LEVEL(deform::backward);
  const auto sum = ACCEL_LEVEL(deform::sum_spots);
  for (b.first_image = 0; b.first_image < p.batch; b.first_image += together) {
    if (!(needs[0] || needs[2] || want_spots)) break;
    b.images = std::min(together, p.batch - b.first_image);
    for (b.first_chunk = 0; b.first_chunk < b.chunk_count; b.first_chunk += at_once) {
      const int64_t count = std::min(at_once, b.chunk_count - b.first_chunk);
      in_parallel(count, [&](int64_t from, int64_t to) { run(b, from, to); });
      if (want_spots)
        in_parallel(b.images * p.offset_groups * taps, [&](int64_t from, int64_t to) { sum(b, count, from, to); });
    }
  }
  if (needs[2]) {
    const auto unpack = ACCEL_LEVEL(deform::unpack_grad_weight);
    in_parallel(b.chunk_count, [&](int64_t from, int64_t to) { unpack(b, from, to); });
  }
  if (want_bias) {
    const auto sum_all = ACCEL_LEVEL(deform::sum_bias);
    in_parallel(ceil_div(p.out_channels, 16), [&](int64_t from, int64_t to) { sum_all(b, from, to); });
  }
  return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
}

}  // namespace
}  // namespace accel::deform_conv2d

#define ACCEL_DEFORM_CONV2D_ARGUMENTS                                                                    \
  "Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, int[] stride, int[] padding, " \
  "int[] dilation, bool border_gradient"

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def("deform_conv2d_forward(" ACCEL_DEFORM_CONV2D_ARGUMENTS ") -> Tensor");
  m.def("deform_conv2d_backward(Tensor grad_out, " ACCEL_DEFORM_CONV2D_ARGUMENTS
        ", bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("deform_conv2d_forward", TORCH_BOX(&accel::deform_conv2d::forward));
  m.impl("deform_conv2d_backward", TORCH_BOX(&accel::deform_conv2d::backward));
}
