// torch ops accel_native::gau_attention_{forward,backward}: checks, allocation, threads. Every argument has the form that
// accel/ops/linear/gau_attention.py gives it, which is the only caller and the place where the op is defined.

#include <tuple>

#include "cpu/_pairs_binding.h"
#include "names.h"

namespace accel::gau_attention {
namespace {

// `x` has the shape of the output and the dtype of q.
Strided like_output(const PairParams& p, const Tensor& q, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == p.batch && x.size(1) == p.heads && x.size(2) == p.queries &&
                      x.size(3) == p.value_dim && x.scalar_type() == q.scalar_type(),
                  name, " must have the shape and dtype of the output");
  return strided(x, name);
}

Params with_gate(const Call& call, const Tensor& q, const OptionalTensor& gate, const std::string& activation) {
  Params p{};
  static_cast<PairParams&>(p) = call.p;
  p.activation = activation_of(activation);
  if (gate) p.gate = like_output(p, q, *gate, "gate");
  return p;
}

// Queries of a forward task: twice as many halve the packing of values, where enough tasks are left for many workers.
int64_t rows_of_task(const PairParams& p) {
  return p.batch * p.heads * p.queries >= 16 * 256 ? 256 : 128;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor gate, OptionalTensor bias,
                                   OptionalTensor line, OptionalTensor table, OptionalTensor mask, OptionalTensor index,
                                   OptionalTensor rows, OptionalTensor seed, Ints grid, std::string, bool,
                                   std::string activation, double scale, double dropout_p, bool keep_sums) {
  Call call = describe(q, k, v, bias, line, table, mask, index, rows, seed, grid, scale, 0.0, dropout_p, 1.0f,
                       "gau_attention takes");
  const std::vector<int> edges = cut_chunks(call, rows_of_task(call.p));
  call.p.chunk_edges = edges.data();
  call.p.chunks = int64_t(edges.size()) - 1;
  Params p = with_gate(call, q, gate, activation);
  Tensor out = allocate(q, p.batch, p.heads, p.queries, p.value_dim);
  Tensor sums = keep_sums ? allocate(q, p.batch, p.heads, p.queries, p.value_dim) : torch::stable::new_empty(q, {0});
  p.out = strided(out, "out");
  if (keep_sums) p.sums = strided(sums, "sums");
  auto run = ACCEL_LEVEL(gau::gau_attention_forward);
  torch::stable::parallel_for(0, p.batch * p.kv_heads * p.chunks, 1, [&](int64_t from, int64_t to) { run(p, from, to); });
  return {out, sums};
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Grads backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, OptionalTensor gate, OptionalTensor bias,
               OptionalTensor line, OptionalTensor table, OptionalTensor mask, OptionalTensor index, OptionalTensor rows,
               OptionalTensor seed, Ints grid, std::string, bool, std::string activation, double scale, double dropout_p,
               bool, bool want_bias, bool want_line, bool want_table) {
  Call call = describe(q, k, v, bias, line, table, mask, index, rows, seed, grid, scale, 0.0, dropout_p, 1.0f,
                       "gau_attention takes");
  BackwardParams b{};
  b.forward = with_gate(call, q, gate, activation);
  const Params& p = b.forward;
  want_bias = want_bias && bias;
  want_line = want_line && line;
  want_table = want_table && table;
  b.grad_out = like_output(p, q, grad_out, "grad_out");
  split(b, p, want_line || want_table, bias, want_bias, BLOCK_KEYS);
  Tensor grad_q = allocate(q, p.batch, p.heads, p.queries, p.head_dim);
  Tensor grad_k = allocate(k, p.batch, p.kv_heads, p.keys, p.head_dim);
  Tensor grad_v = allocate(v, p.batch, p.kv_heads, p.keys, p.value_dim);
  b.grad_q = strided(grad_q, "grad_q"), b.grad_k = strided(grad_k, "grad_k"), b.grad_v = strided(grad_v, "grad_v");
  SumTensors sums = allocate_sums(b, p, q, bias, want_bias, want_line, want_table);
  auto run = ACCEL_LEVEL(gau::gau_attention_backward);
  torch::stable::parallel_for(0, b.batch_runs * b.head_runs * b.key_runs, 1,
                              [&](int64_t from, int64_t to) { run(b, from, to); });
  if (b.part_q) {
    auto sum = ACCEL_LEVEL(gau::gau_attention_sum_queries);
    torch::stable::parallel_for(0, p.batch * p.heads, 1, [&](int64_t from, int64_t to) { sum(b, from, to); });
  }
  auto [grad_line, grad_table] = small_gradients(b, p, q);
  return {grad_q, grad_k, grad_v, sums.bias, grad_line, grad_table};
}

}  // namespace
}  // namespace accel::gau_attention

#define ACCEL_GAU_ARGUMENTS                                                                                            \
  "Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? bias, Tensor? line, Tensor? bias_table, Tensor? mask, "         \
  "Tensor? bias_index, Tensor? rows, Tensor? seed, int[] grid, str rule, bool packed, str activation, float scale, "   \
  "float dropout_p, bool keep_sums"

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def("gau_attention_forward(" ACCEL_GAU_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("gau_attention_backward(Tensor grad_out, " ACCEL_GAU_ARGUMENTS
        ", bool want_bias, bool want_line, bool want_table) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("gau_attention_forward", TORCH_BOX(&accel::gau_attention::forward));
  m.impl("gau_attention_backward", TORCH_BOX(&accel::gau_attention::backward));
}
