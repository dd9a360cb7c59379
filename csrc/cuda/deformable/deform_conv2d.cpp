// The CUDA side of accel_native::deform_conv2d_{forward,backward}, whose schemas stand beside the CPU's binding.
// accel/ops/deformable/deform_conv2d.py is the only caller and the place where the op is defined.
//
// The forward is one kernel. The backward makes the gradients of the sampled values by a matrix product, a few images at
// a time, sends them back to the input and to offsets and masks, and leaves in their place the values themselves, with
// which another product gives the weight's gradient.

#include "cuda/deformable/deform_conv2d.h"

#include "cuda/_matrix.h"
#include "cuda/deformable/conv_forward.h"

namespace accel::deform_conv2d {
namespace {

using torch::stable::transpose;

#ifndef ACCEL_COLUMNS_AT_ONCE  // a test takes few at once
#define ACCEL_COLUMNS_AT_ONCE (int64_t{64} << 20)
#endif
constexpr int64_t columns_at_once = ACCEL_COLUMNS_AT_ONCE;  // bytes, if that is enough for one image
constexpr int64_t busy_tiles = 264, tile = 128;         // a product's blocks for every processor of an H100, twice
constexpr int64_t parts_at_once = int64_t{32} << 20;    // bytes of parts of the weight's gradient

struct Sizes {
  int64_t batch, channels, height, width, out_channels, out_height, out_width, groups, offset_groups, taps;
  bool last;  // input, and with it all maps, are channels_last

  int64_t pixels() const { return height * width; }
  int64_t outputs() const { return out_height * out_width; }
  int64_t in_group() const { return channels / groups; }
  int64_t out_group() const { return out_channels / groups; }
};

bool is_last(const Tensor& x) {
  return x.size(1) > 1 && x.stride(1) == 1 && !x.is_contiguous();
}

// Contiguous in one of the two formats.
void check_map(const Tensor& x, const char* name, bool last) {
  STD_TORCH_CHECK(where_kernels_run(x) && x.dim() == 4, name, " must be a 4-D tensor on the GPU");
  const bool whole = last ? x.stride(1) == 1 && (x.stride(3) == x.size(1) || x.size(3) == 1) &&
                                (x.stride(2) == x.size(1) * x.size(3) || x.size(2) == 1) &&
                                (x.stride(0) == x.size(1) * x.size(2) * x.size(3) || x.size(0) == 1)
                          : x.is_contiguous();
  STD_TORCH_CHECK(whole, name, " must be contiguous, or channels_last where input is");
}

void check_spots(const OptionalTensor& x, const char* name, const Tensor& input, int64_t numel) {
  if (x) check_cuda(*x, name, input, ScalarType::Float, numel);
}

Sizes sizes_of(const Tensor& input, const Tensor& offset, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& mask, const Ints& stride, const Ints& padding, const Ints& dilation) {
  STD_TORCH_CHECK(input.dim() == 4 && offset.dim() == 4 && weight.dim() == 4, "input, offset and weight must be 4-D");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "stride, padding, dilation are pairs");
  const bool last = is_last(input);
  check_map(input, "input", last);
  STD_TORCH_CHECK(input.scalar_type() != ScalarType::Float && dtype_of(input) > 0, "input must be bfloat16 or float16");
  check_cuda(weight, "weight", input, input.scalar_type(), weight.numel());
  Sizes n{};
  n.last = last;
  n.batch = input.size(0), n.channels = input.size(1), n.height = input.size(2), n.width = input.size(3);
  n.out_channels = weight.size(0), n.out_height = offset.size(2), n.out_width = offset.size(3);
  n.taps = weight.size(2) * weight.size(3);
  STD_TORCH_CHECK(weight.numel() > 0 && n.channels > 0 && n.channels % weight.size(1) == 0,
                  "weight does not fit the input's channels");
  n.groups = n.channels / weight.size(1);
  STD_TORCH_CHECK(n.out_channels % n.groups == 0, "weight groups must divide the output channels");
  STD_TORCH_CHECK(offset.size(0) == n.batch && offset.size(1) > 0 && offset.size(1) % (2 * n.taps) == 0,
                  "offset must be (N, 2*G*K, Ho, Wo)");
  n.offset_groups = offset.size(1) / (2 * n.taps);
  STD_TORCH_CHECK(n.channels % n.offset_groups == 0, "offset groups must divide the channels");
  const int64_t spots = n.batch * n.offset_groups * n.taps * n.outputs();
  check_spots(offset, "offset", input, 2 * spots);
  check_spots(mask, "mask", input, spots);
  check_spots(bias, "bias", input, n.out_channels);
  return n;
}

// What both launch functions are told alike.
template <class Params>
void fill(Params& p, const Sizes& n, const Tensor& input, const Tensor& offset, const Tensor& weight,
          const OptionalTensor& mask, const Ints& stride, const Ints& padding, const Ints& dilation) {
  p.offset = floats(offset);
  p.mask = data_or_null(mask);
  p.batch = int32_of(n.batch, "N"), p.channels = int32_of(n.channels, "C");
  p.height = int32_of(n.height, "H"), p.width = int32_of(n.width, "W");
  p.out_height = int32_of(n.out_height, "Ho"), p.out_width = int32_of(n.out_width, "Wo");
  p.dtype = dtype_of(input);
  for (size_t i = 0; i < 2; ++i) {
    p.kernel[i] = int32_of(weight.size(int64_t(i) + 2), "kernel");
    p.stride[i] = int32_of(stride[i], "stride");
    p.padding[i] = int32_of(padding[i], "padding");
    p.dilation[i] = int32_of(dilation[i], "dilation");
  }
}

// A map as (N, pixels, channels): its own memory where it is channels_last, else a copy.
Tensor rows_of(const Tensor& map, bool last, void* stream) {
  return last ? map : swapped(map, map.size(0), map.size(1), map.size(2) * map.size(3), stream);
}

// A new map of (N, C, H, W), channels_last if `last`.
Tensor new_map(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool last) {
  const auto format = last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  // no transposed view: autograd forbids to change one in place
  return torch::stable::empty({n, c, h, w}, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

Tensor forward(Tensor input, Tensor offset, Tensor weight, OptionalTensor bias, OptionalTensor mask, Ints stride,
               Ints padding, Ints dilation, bool) {
  const OnDevice device(input);
  const Sizes n = sizes_of(input, offset, weight, bias, mask, stride, padding, dilation);
  Tensor out = new_map(input, n.batch, n.out_channels, n.out_height, n.out_width, n.last);
  if (n.batch == 0) return out;
  DeformConv2dForward p{};
  fill(p, n, input, offset, weight, mask, stride, padding, dilation);
  const Tensor rows = rows_of(input, n.last, device.stream());
  p.groups = int32_of(n.groups, "groups"), p.offset_groups = int32_of(n.offset_groups, "G");
  p.out_channels = int32_of(n.out_channels, "O");
  p.last = n.last;
  p.processors = accel_cuda_processors(input.get_device_index());
  p.shared = accel_cuda_shared_memory(input.get_device_index());
  const int64_t packed_size = accel_deform_conv2d_packed(&p);
  STD_TORCH_CHECK(packed_size >= 0, "the kernel does not take these sizes");
  Tensor packed = torch::stable::new_empty(input, {packed_size});
  p.input = rows.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = data_or_null(bias);
  p.out = out.mutable_data_ptr();
  p.packed = packed.mutable_data_ptr();
  check_launch(accel_deform_conv2d_forward(&p, device.stream()), "deform_conv2d");
  return out;
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The products of the backward. Columns are (rows, K, C) with C = (g, C/g), a row of each output; with weight groups
// these are no matrices, but those of each tap are, one for each group.
struct Products {
  const Sizes& n;

  int64_t ways() const { return n.groups == 1 ? 1 : n.taps; }
  int64_t width() const { return n.groups == 1 ? n.taps * n.channels : n.in_group(); }

  Part grads(int64_t rows, int64_t first = 0) const {  // of the outputs, (g, rows, O/g)
    return {first * n.out_channels, {n.groups, rows, n.out_group()}, {n.out_group(), n.out_channels, 1}};
  }
  Part columns(int64_t rows, int64_t way, int64_t first = 0) const {  // (g, rows, width)
    const int64_t row = n.taps * n.channels;
    return {first * row + way * n.channels, {n.groups, rows, width()}, {n.in_group(), row, 1}};
  }
  Part weight(int64_t way) const {  // of (O, K, C/g): (g, O/g, width)
    const int64_t row = n.taps * n.in_group();
    return {way * n.in_group(), {n.groups, n.out_group(), width()}, {n.out_group() * row, row, 1}};
  }

  void columns_grads(const Tensor& grad_rows, const Tensor& weight_rows, const Tensor& out, int64_t first,
                     int64_t rows) const {
    for (int64_t way = 0; way < ways(); ++way)
      multiply(part_of(grad_rows, grads(rows, first)), part_of(weight_rows, weight(way)),
               part_of(out, columns(rows, way)));
  }

  // In how many pieces the sum over `rows` is made side by side: a product of few blocks leaves processors idle.
  int64_t splits(int64_t rows) const {
    if (n.groups > 1) return 1;
    const int64_t blocks = ((n.out_channels + tile - 1) / tile) * ((width() + tile - 1) / tile);
    const int64_t room = parts_at_once / (4 * n.out_channels * width());
    return std::clamp<int64_t>(std::min((busy_tiles + blocks - 1) / blocks, room), 1, std::max<int64_t>(rows / tile, 1));
  }

  // The weight's gradient from the columns of `rows` outputs, fp32, (pieces, O, K, C/g).
  Tensor weight_grads(const Tensor& grad_rows, const Tensor& columns_now, int64_t first, int64_t rows) const {
    const int64_t pieces = splits(rows), each = rows / pieces, rest = rows - pieces * each;
    const int64_t size = n.out_channels * n.taps * n.in_group();
    Tensor out = torch::stable::new_empty(grad_rows, {pieces + (rest > 0), size}, ScalarType::Float);
    auto sum = [&](int64_t from, int64_t count, int64_t piece, int64_t batch) {
      for (int64_t way = 0; way < ways(); ++way) {
        Part of_grads = grads(count, first + from), of_columns = columns(count, way, from), to = weight(way);
        to.at += piece * size;
        if (n.groups == 1) {  // the batch is of pieces
          of_grads.size[0] = of_columns.size[0] = to.size[0] = batch;
          of_grads.stride[0] = count * n.out_channels;
          of_columns.stride[0] = count * n.taps * n.channels;
          to.stride[0] = size;
        }
        multiply(transpose(part_of(grad_rows, of_grads), 1, 2), part_of(columns_now, of_columns), part_of(out, to));
      }
    };
    sum(0, each, 0, pieces);
    if (rest > 0) sum(pieces * each, rest, pieces, 1);
    return torch::stable::sum(out, {{0}});
  }
};

Grads backward(Tensor grad_out, Tensor input, Tensor offset, Tensor weight, OptionalTensor bias, OptionalTensor mask,
               Ints stride, Ints padding, Ints dilation, bool border_gradient, Bools needs) {
  const OnDevice device(input);
  const Sizes n = sizes_of(input, offset, weight, bias, mask, stride, padding, dilation);
  STD_TORCH_CHECK(needs.size() == 5, "needs must say something of each of five tensors");
  check_map(grad_out, "grad_out", n.last);
  STD_TORCH_CHECK(grad_out.size(0) == n.batch && grad_out.size(1) == n.out_channels &&
                      grad_out.size(2) == n.out_height && grad_out.size(3) == n.out_width &&
                      grad_out.scalar_type() == input.scalar_type(),
                  "grad_out must have the shape and dtype of the output");
  const bool need_mask = needs[4] && mask, need_bias = needs[3] && bias;
  const int64_t outputs = n.outputs();
  Tensor grad_offset = like(offset, needs[1]), grad_mask = need_mask ? like(*mask, true) : like(offset, false);
  Tensor grad_weight = like(weight, needs[2]);
  Tensor grad_rows = rows_of(grad_out, n.last, device.stream());
  Tensor input_rows = rows_of(input, n.last, device.stream());
  Tensor grad_bias = like(offset, false);
  if (need_bias) {
    const Tensor all = part_of(grad_rows, {0, {1, n.batch * outputs, n.out_channels}, {0, n.out_channels, 1}});
    grad_bias = torch::stable::sum(all, {{0, 1}}, false, ScalarType::Float);
  }
  Tensor grad_input_rows = needs[0] ? new_map(input, n.batch, n.channels, n.height, n.width, true) : like(input, false);

  // of the weight, as the products read it
  const Tensor by_tap = torch::stable::view(weight, {n.out_channels, n.in_group(), n.taps});
  const Tensor weight_rows = torch::stable::clone(torch::stable::contiguous(transpose(by_tap, 1, 2)));
  const Products products{n};
  const bool grads_of_columns = needs[0] || needs[1] || need_mask;
  const int64_t row = n.taps * n.channels, image = outputs * row * int64_t(input.element_size());
  const int64_t at_once = std::clamp<int64_t>(columns_at_once / image, 1, std::max<int64_t>(n.batch, 1));
  Tensor columns = torch::stable::new_empty(input, {grads_of_columns || needs[2] ? at_once * outputs * row : 0});
  std::optional<Tensor> sum;  // of the weight's gradient

  DeformConv2d p{};
  fill(p, n, input, offset, weight, mask, stride, padding, dilation);
  p.groups = int32_of(n.offset_groups, "G");
  p.sample = needs[2];
  p.border_gradient = border_gradient;
  p.columns = columns.mutable_data_ptr();
  p.batch = int32_of(at_once, "N");
  const int64_t scratch_each = accel_deform_conv2d_scratch(&p);
  Tensor scratch = needs[0] ? scratch_for(input, scratch_each, at_once) : like(input, false);
  p.scratch = scratch.mutable_data_ptr();
  p.scratch_bytes = needs[0] ? scratch.numel() : 0;
  const int64_t spots = n.offset_groups * n.taps * outputs;
  auto bytes = [](const Tensor& x, int64_t at) {
    return static_cast<char*>(const_cast<void*>(x.const_data_ptr())) + at * int64_t(x.element_size());
  };
  for (int64_t first = 0; first < n.batch && (grads_of_columns || needs[2]); first += at_once) {
    p.batch = int32_t(std::min(at_once, n.batch - first));
    const int64_t rows = p.batch * outputs;
    if (grads_of_columns) products.columns_grads(grad_rows, weight_rows, columns, first * outputs, rows);
    p.input = bytes(input_rows, first * n.pixels() * n.channels);
    p.offset = floats(offset) + first * 2 * spots;
    p.mask = mask ? floats(*mask) + first * spots : nullptr;
    p.grad_input = needs[0] ? bytes(grad_input_rows, first * n.pixels() * n.channels) : nullptr;
    p.grad_offset = needs[1] ? mutable_floats(grad_offset) + first * 2 * spots : nullptr;
    p.grad_mask = need_mask ? mutable_floats(grad_mask) + first * spots : nullptr;
    check_launch(accel_deform_conv2d_backward(&p, device.stream()), "deform_conv2d backward");
    if (!needs[2]) continue;
    Tensor now = products.weight_grads(grad_rows, columns, first * outputs, rows);
    sum = sum ? torch::stable::subtract(*sum, now, -1.0) : now;  // has no addition
  }
  if (needs[2]) {
    Tensor to = torch::stable::view(grad_weight, {n.out_channels, n.in_group(), n.taps});
    if (sum)
      torch::stable::copy_(to, transpose(torch::stable::view(*sum, {n.out_channels, n.taps, n.in_group()}), 1, 2));
    else
      torch::stable::zero_(to);
  }
  Tensor grad_input = grad_input_rows;
  if (needs[0] && !n.last) {
    grad_input = torch::stable::view(swapped(grad_input_rows, n.batch, n.pixels(), n.channels, device.stream()),
                                     {n.batch, n.channels, n.height, n.width});
  }
  return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
}

}  // namespace
}  // namespace accel::deform_conv2d

STABLE_TORCH_LIBRARY_IMPL(accel_native, ACCEL_KERNELS_ARE_ON, m) {
  m.impl("deform_conv2d_forward", TORCH_BOX(&accel::deform_conv2d::forward));
  m.impl("deform_conv2d_backward", TORCH_BOX(&accel::deform_conv2d::backward));
}
