// torch ops accel_native::softmax_attention_{forward,backward}: checks, allocation, threads. Every argument has the
// form that accel/ops/attention/softmax_attention.py gives it, which is the only caller and the place where the op is defined.

#include <string>
#include <tuple>

#include "cpu/_pairs_binding.h"
#include "params.h"

namespace accel::softmax_attention {
namespace {

constexpr double LOG2_E = 1.4426950408889634;

Params with_sinks(const Call& call, const OptionalTensor& sinks) {
  Params p{};
  static_cast<PairParams&>(p) = call.p;
  if (sinks) {
    STD_TORCH_CHECK(sinks->stride(0) == 1 || sinks->numel() == 1, "sinks must be contiguous");
    check_f32(sinks, "sinks", p.heads);
    p.sinks = data_or_null(sinks);
  }
  return p;
}

// Rows of queries a forward task holds: enough to pay for packing its keys, few enough for the second-level cache.
int64_t rows_of_task(const PairParams& p) {
  return std::clamp<int64_t>(65536 / (p.head_dim + p.value_dim), TILE_ROWS, 1024);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor bias, OptionalTensor line,
                                           OptionalTensor table, OptionalTensor sinks, OptionalTensor mask,
                                           OptionalTensor index, OptionalTensor rows, OptionalTensor seed, Ints grid,
                                           std::string, double scale, double softcap, double dropout_p) {
  Call call = describe(q, k, v, bias, line, table, mask, index, rows, seed, grid, scale, softcap, dropout_p,
                       float(LOG2_E), "softmax_attention takes");
  const std::vector<int> edges = cut_chunks(call, rows_of_task(call.p));
  call.p.chunk_edges = edges.data();
  call.p.chunks = int64_t(edges.size()) - 1;
  Params p = with_sinks(call, sinks);
  Tensor out = allocate(q, p.batch, p.heads, p.queries, p.value_dim);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.queries}, ScalarType::Float);
  const bool adds = bias || line || table;
  Tensor peak = torch::stable::new_empty(q, adds ? Ints{2, p.batch, p.heads, p.queries} : Ints{0}, ScalarType::Float);
  p.out = strided(out, "out");
  p.lse = mutable_floats(lse);
  p.peak = adds ? mutable_floats(peak) : nullptr;
  const int64_t pairs = p.batch * p.kv_heads;
  auto run = ACCEL_LEVEL(softmax::softmax_attention_forward);
  torch::stable::parallel_for(0, pairs * p.chunks, 1, [&](int64_t from, int64_t to) { run(p, from, to); });
  return {out, lse, peak};
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Grads backward(Tensor grad_out, Tensor delta, Tensor lse, Tensor peak, Tensor q, Tensor k, Tensor v,
               OptionalTensor bias, OptionalTensor line, OptionalTensor table, OptionalTensor sinks, OptionalTensor mask,
               OptionalTensor index, OptionalTensor rows, OptionalTensor seed, Ints grid, std::string, double scale,
               double softcap, double dropout_p, bool want_bias, bool want_line, bool want_table) {
  Call call = describe(q, k, v, bias, line, table, mask, index, rows, seed, grid, scale, softcap, dropout_p,
                       float(LOG2_E), "softmax_attention takes");
  Params p = with_sinks(call, sinks);
  const int64_t per_query = p.batch * p.heads * p.queries;
  check_f32(delta, "delta", per_query);
  check_f32(lse, "lse", per_query);
  p.lse = mutable_floats(lse);
  if (bias || line || table) {
    check_f32(peak, "peak", 2 * per_query);
    p.peak = mutable_floats(peak);
  }
  want_bias = want_bias && bias;
  want_line = want_line && line;
  want_table = want_table && table;

  BackwardParams b{};
  b.forward = p;
  b.grad_out = strided(grad_out, "grad_out");
  STD_TORCH_CHECK(grad_out.size(0) == p.batch && grad_out.size(1) == p.heads && grad_out.size(2) == p.queries &&
                      grad_out.size(3) == p.value_dim && grad_out.scalar_type() == q.scalar_type(),
                  "grad_out must have the shape and dtype of the output");
  b.delta = data_or_null(delta);
  split(b, p, want_line || want_table, bias, want_bias, 512);
  Tensor grad_q = allocate(q, p.batch, p.heads, p.queries, p.head_dim);
  Tensor grad_k = allocate(k, p.batch, p.kv_heads, p.keys, p.head_dim);
  Tensor grad_v = allocate(v, p.batch, p.kv_heads, p.keys, p.value_dim);
  b.grad_q = strided(grad_q, "grad_q"), b.grad_k = strided(grad_k, "grad_k"), b.grad_v = strided(grad_v, "grad_v");
  SumTensors sums = allocate_sums(b, p, q, bias, want_bias, want_line, want_table);
  auto run = ACCEL_LEVEL(softmax::softmax_attention_backward);
  torch::stable::parallel_for(0, b.batch_runs * b.head_runs * b.key_runs, 1,
                              [&](int64_t from, int64_t to) { run(b, from, to); });
  if (b.part_q) {
    auto sum = ACCEL_LEVEL(softmax::softmax_attention_sum_queries);
    torch::stable::parallel_for(0, p.batch * p.heads, 1, [&](int64_t from, int64_t to) { sum(b, from, to); });
  }
  auto [grad_line, grad_table] = small_gradients(b, p, q);
  return {grad_q, grad_k, grad_v, sums.bias, grad_line, grad_table};
}

}  // namespace
}  // namespace accel::softmax_attention

#define ACCEL_SOFTMAX_ARGUMENTS                                                                                     \
  "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? line, Tensor? bias_table, Tensor? sinks, Tensor? mask, "     \
  "Tensor? bias_index, Tensor? rows, Tensor? seed, int[] grid, str rule, float scale, float softcap, float dropout_p"

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def("softmax_attention_forward(" ACCEL_SOFTMAX_ARGUMENTS ") -> (Tensor, Tensor, Tensor)");
  m.def("softmax_attention_backward(Tensor grad_out, Tensor delta, Tensor lse, Tensor peak, " ACCEL_SOFTMAX_ARGUMENTS
        ", bool want_bias, bool want_line, bool want_table) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("softmax_attention_forward", TORCH_BOX(&accel::softmax_attention::forward));
  m.impl("softmax_attention_backward", TORCH_BOX(&accel::softmax_attention::backward));
}
