// torch ops accel_native::window_attention_{forward,backward}: checks, allocation, threads. Every small parameter
// comes as float32; accel/ops/windows/window_attention.py is the only caller and the place where the op is defined.

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/_binding.h"
#include "params.h"

namespace accel::window_attention {
namespace {

struct Call {
  Params p{};
  Tensor logit_bias;  // what p.logit_bias points into
};

Call describe(const Tensor& qkv, const OptionalTensor& table, const OptionalTensor& bias,
              const OptionalTensor& head_scale, const OptionalTensor& qkv_bias, const OptionalTensor& seed,
              int64_t heads, const Ints& window, const Ints& shift, double scale, bool roll_first, double mask_value,
              double dropout_p) {
  check_cpu(qkv, "qkv");
  STD_TORCH_CHECK(qkv.dim() == 5 && window.size() == 3 && shift.size() == 3, "qkv must be 5-D, window and shift of 3");
  STD_TORCH_CHECK(heads > 0 && qkv.size(4) > 0 && qkv.size(4) % (3 * heads) == 0, "qkv must hold 3·heads·head_dim");
  Call call;
  Params& p = call.p;
  p.batch = qkv.size(0);
  p.windows = 1;
  int64_t tokens = 1, rows = 1;
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(window[i] > 0 && shift[i] >= 0 && shift[i] < window[i], "window must be positive, shift below it");
    p.size[i] = qkv.size(i + 1);
    p.window[i] = window[i];
    p.shift[i] = shift[i];
    p.count[i] = (p.size[i] + window[i] - 1) / window[i];
    p.padded[i] = p.count[i] * window[i];
    p.windows *= p.count[i];
    tokens *= window[i];
    rows *= 2 * window[i] - 1;
    STD_TORCH_CHECK(tokens <= 1 << 20, "a window of more than 2^20 tokens");
  }
  p.tokens = int(tokens);
  p.heads = int(heads);
  p.head_dim = int(qkv.size(4) / (3 * heads));
  check_f32(table, "bias_table", rows * heads);
  check_f32(bias, "bias", heads * tokens * tokens);
  check_f32(head_scale, "head_scale", heads);
  check_f32(qkv_bias, "qkv_bias", qkv.size(4));
  p.roll_first = roll_first;
  p.scale = float(scale);
  p.mask_value = float(mask_value);
  p.dtype = dtype_of(qkv, "window_attention takes");
  p.qkv = qkv.const_data_ptr();
  p.head_scale = data_or_null(head_scale);
  p.qkv_bias = data_or_null(qkv_bias);
  p.dropout = dropout_p > 0.0;
  if (p.dropout) {
    STD_TORCH_CHECK(seed && dropout_p < 1.0, "dropout needs a seed and a probability below 1");
    check_cpu(*seed, "seed");
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed must be one int64");
    p.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
    p.drop_below = uint64_t(dropout_p * 4294967296.0);
    p.keep_scale = float(1.0 / (1.0 - dropout_p));
  }

  const int64_t ld = padded_to(tokens, ACCEL_LEVEL(window::width)());
  const bool biased = table || bias;
  const int64_t bias_heads = biased ? heads : 1;
  call.logit_bias = torch::stable::new_empty(qkv, {bias_heads, tokens, ld}, ScalarType::Float);
  float* out = mutable_floats(call.logit_bias);
  auto expand = ACCEL_LEVEL(window::expand_bias);
  torch::stable::parallel_for(0, bias_heads, 4, [&](int64_t from, int64_t to) {
    expand(p, data_or_null(table), data_or_null(bias), out, from, to);
  });
  p.logit_bias = out;
  p.bias_head_stride = biased ? tokens * ld : 0;
  return call;
}

std::tuple<Tensor, Tensor> forward(Tensor qkv, OptionalTensor table, OptionalTensor bias, OptionalTensor head_scale,
                                   OptionalTensor qkv_bias, OptionalTensor seed, int64_t heads, Ints window, Ints shift,
                                   double scale, bool roll_first, double mask_value, double dropout_p) {
  Call call = describe(qkv, table, bias, head_scale, qkv_bias, seed, heads, window, shift, scale, roll_first,
                       mask_value, dropout_p);
  Params& p = call.p;
  std::vector<int64_t> shape{p.batch, p.size[0], p.size[1], p.size[2], qkv.size(4) / 3};
  Tensor out = torch::stable::new_empty(qkv, shape);
  Tensor lse = torch::stable::new_empty(qkv, {p.batch * p.windows, heads, int64_t(p.tokens)}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = mutable_floats(lse);
  auto run = ACCEL_LEVEL(window::window_attention_forward);
  torch::stable::parallel_for(0, p.batch * p.windows * heads, 1,
                              [&](int64_t from, int64_t to) { run(p, from, to); });
  return {out, lse};
}

// Runs long enough to pay for their own sum of the bias gradient, tasks enough for many cores, heads together where
// that leaves enough (a token's heads lie side by side), and bounded buffers where a head holds an (N, N) gradient.
void split(BackwardParams& b) {
  constexpr int64_t RUN = 8, CHUNKS = 64, TASKS = 32, TASK_BYTES = 512 << 10, PARTIAL_BYTES = int64_t(32) << 20;
  const Params& p = b.forward;
  const int64_t total = p.batch * p.windows, square_bytes = int64_t(p.tokens) * p.tokens * 4;
  b.chunks = std::clamp<int64_t>(total / RUN, 1, CHUNKS);
  if (b.want_dense)
    b.chunks = std::clamp<int64_t>(PARTIAL_BYTES / (p.heads * square_bytes), 1, b.chunks);
  const int64_t wanted_groups = (TASKS + b.chunks - 1) / b.chunks;
  b.group_heads = std::clamp<int64_t>(TASK_BYTES / square_bytes, 1, std::max<int64_t>(1, p.heads / wanted_groups));
  b.groups = (p.heads + b.group_heads - 1) / b.group_heads;
}

// to[i·step] = Σ_c from[c·length + i], in the order of c.
void reduce(const float* from, int64_t chunks, int64_t length, float* to, int64_t step) {
  for (int64_t i = 0; i < length; ++i) to[i * step] = from[i];
  for (int64_t c = 1; c < chunks; ++c)
    for (int64_t i = 0; i < length; ++i) to[i * step] += from[c * length + i];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_out, Tensor qkv, OptionalTensor table, OptionalTensor bias, OptionalTensor head_scale,
    OptionalTensor qkv_bias, OptionalTensor seed, int64_t heads, Ints window, Ints shift, double scale,
    bool roll_first, double mask_value, double dropout_p, bool want_table, bool want_bias, bool want_head_scale,
    bool want_qkv_bias) {
  Call call = describe(qkv, table, bias, head_scale, qkv_bias, seed, heads, window, shift, scale, roll_first,
                       mask_value, dropout_p);
  const Params& p = call.p;
  check_cpu(grad_out, "grad_out");
  STD_TORCH_CHECK(grad_out.numel() * 3 == qkv.numel() && grad_out.scalar_type() == qkv.scalar_type(),
                  "grad_out must have the shape and dtype of the output");
  STD_TORCH_CHECK(p.batch * p.windows > 0, "an empty batch has no backward kernel");
  want_table = want_table && table;
  want_bias = want_bias && bias;
  want_head_scale = want_head_scale && head_scale;
  want_qkv_bias = want_qkv_bias && qkv_bias;

  BackwardParams b{};
  b.forward = p;
  b.want_table = want_table;
  b.want_dense = want_bias;
  b.table_rows = table ? table->size(0) : 0;
  split(b);
  const int64_t parts = heads * b.chunks, square = int64_t(p.tokens) * p.tokens;
  auto floats = [&](bool wanted, std::vector<int64_t> shape) {
    if (!wanted) shape = {0};
    return torch::stable::new_empty(qkv, shape, ScalarType::Float);
  };
  Tensor part_bias = floats(want_table || want_bias, {parts, want_table ? b.table_rows : square});
  Tensor part_scale = floats(want_head_scale, {parts});
  Tensor part_fill = floats(want_qkv_bias, {parts, 3 * int64_t(p.head_dim)});
  b.part_bias = want_table || want_bias ? mutable_floats(part_bias) : nullptr;
  b.part_head_scale = want_head_scale ? mutable_floats(part_scale) : nullptr;
  b.part_qkv_bias = want_qkv_bias ? mutable_floats(part_fill) : nullptr;
  b.grad_out = grad_out.const_data_ptr();
  Tensor grad_qkv = torch::stable::empty_like(qkv);
  b.grad_qkv = grad_qkv.mutable_data_ptr();

  auto run = ACCEL_LEVEL(window::window_attention_backward);
  torch::stable::parallel_for(0, b.groups * b.chunks, 1, [&](int64_t from, int64_t to) { run(b, from, to); });

  Tensor grad_table = floats(want_table, {b.table_rows, heads});
  Tensor grad_bias = floats(want_bias, {heads, int64_t(p.tokens), int64_t(p.tokens)});
  Tensor grad_head_scale = floats(want_head_scale, {heads});
  Tensor grad_qkv_bias = floats(want_qkv_bias, {qkv.size(4)});
  torch::stable::parallel_for(0, heads, 1, [&](int64_t from, int64_t to) {
    for (int64_t h = from; h < to; ++h) {
      const int64_t first = h * b.chunks, D = p.head_dim;
      if (want_table)
        reduce(b.part_bias + first * b.table_rows, b.chunks, b.table_rows, mutable_floats(grad_table) + h, heads);
      if (want_bias) reduce(b.part_bias + first * square, b.chunks, square, mutable_floats(grad_bias) + h * square, 1);
      if (want_head_scale) reduce(b.part_head_scale + first, b.chunks, 1, mutable_floats(grad_head_scale) + h, 1);
      if (want_qkv_bias) {
        std::vector<float> sum(3 * size_t(D));
        reduce(b.part_qkv_bias + first * 3 * D, b.chunks, 3 * D, sum.data(), 1);
        for (int64_t which = 0; which < 3; ++which)
          std::copy_n(sum.data() + which * D, D, mutable_floats(grad_qkv_bias) + (which * heads + h) * D);
      }
    }
  });
  return {grad_qkv, grad_table, grad_bias, grad_head_scale, grad_qkv_bias};
}

}  // namespace
}  // namespace accel::window_attention

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def(
      "window_attention_forward(Tensor qkv, Tensor? bias_table, Tensor? bias, Tensor? head_scale, Tensor? qkv_bias, "
      "Tensor? seed, int num_heads, int[] window, int[] shift, float scale, bool roll_first, float mask_value, "
      "float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor? bias_table, Tensor? bias, Tensor? head_scale, "
      "Tensor? qkv_bias, Tensor? seed, int num_heads, int[] window, int[] shift, float scale, bool roll_first, "
      "float mask_value, float dropout_p, bool want_table, bool want_bias, bool want_head_scale, bool want_qkv_bias) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("window_attention_forward", TORCH_BOX(&accel::window_attention::forward));
  m.impl("window_attention_backward", TORCH_BOX(&accel::window_attention::backward));
}
