// torch ops accel_native::flash_mix_{forward,backward}: checks, allocation, threads. Every argument has the form that
// accel/ops/linear/flash_mix.py gives it, which is the only caller and the place where the op is defined.

#include <string>
#include <tuple>

#include "cpu/_pairs_binding.h"
#include "cpu/linear/gau_attention/names.h"
#include "params.h"

namespace accel::flash_mix {
namespace {

using gau_attention::activation_of;

// What the parameters point into, besides tensors of the call.
struct Cut {
  Call pairs;
  std::vector<int> edges;
  std::vector<Sequence> sequences;
  std::vector<Chunk> chunks;
  std::vector<char> bad, lost;
  Tensor states;
};

// (B, T, size) as one head.
Strided rows_of(const Tensor& x, const Tensor& like, int64_t size, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == like.size(0) && x.size(1) == like.size(1) && x.size(2) == size &&
                      x.scalar_type() == like.scalar_type(),
                  name, " must be (B, T, ", size, ") in the dtype of quad_q");
  return strided(torch::stable::unsqueeze(x, 1), name);
}

Tensor empty_rows(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {like.size(0), like.size(1), size});
}

// Whether a kernel multiplies pairs of bf16.
bool in_pairs(const Params& p) { return p.pairs.dtype == Dtype::bf16 && isa() == Isa::avx512_bf16; }

// A row of `columns` numbers in words.
int64_t row_words(const Params& p, int64_t columns) {
  return ((in_pairs(p) ? (columns + 1) / 2 : columns) + 15) / 16 * 16;
}

// Rows that a product adds up over; each begins an odd number of cache lines behind the one before.
Ints summed_rows(const Params& p, int64_t rows, int64_t columns) {
  const auto spread = [](int64_t n) { return ((n + 15) / 16 | 1) * 16; };
  if (in_pairs(p)) return {(rows + 1) / 2, spread((columns + 31) / 32 * 32)};
  return {rows, spread(columns)};
}

void cut_sequence(Cut& cut, int64_t batch, int64_t from, int64_t to, int64_t span, int64_t chunk_size, float scale) {
  const int64_t first = int64_t(cut.chunks.size());
  for (int64_t at = from; at < to; at += span) {
    const int64_t count = std::min(span, to - at);
    cut.chunks.push_back({int64_t(cut.sequences.size()), batch, at, int(count), count == chunk_size});
  }
  cut.sequences.push_back({first, int64_t(cut.chunks.size()), scale});
}

// Where something that is not finite goes: from a chunk whose sum holds such to those behind it, or before it, and
// without order to all of its sequence.
std::vector<char> reached(const Cut& cut, const std::vector<char>& bad, bool causal, bool forwards,
                          std::vector<char>& at_end) {
  std::vector<char> lost(cut.chunks.size());
  const int64_t panels = cut.chunks.empty() ? 1 : int64_t(bad.size() / cut.chunks.size());
  for (size_t n = 0; n < cut.sequences.size(); ++n) {
    const Sequence& s = cut.sequences[n];
    char any = at_end[n];
    for (int64_t i = 0; i < s.end - s.first; ++i) {
      const int64_t c = forwards ? s.first + i : s.end - 1 - i;
      lost[size_t(c)] = any;
      for (int64_t panel = 0; panel < panels; ++panel) any |= bad[size_t(c * panels + panel)];
    }
    if (!causal) std::fill(lost.begin() + s.first, lost.begin() + s.end, any);
    at_end[n] = any;
  }
  return lost;
}

// Which sums of (N, size) hold something that is not finite.
std::vector<char> not_finite(const float* x, size_t count, int64_t size) {
  std::vector<char> out(count);
  for (size_t n = 0; x && n < count; ++n) {
    float check = 0.0f;
    for (int64_t i = 0; i < size; ++i) check += x[int64_t(n) * size + i] * 0.0f;
    out[n] = !(check == 0.0f);
  }
  return out;
}

void spoil(float* x, const std::vector<char>& lost, int64_t size) {
  for (size_t n = 0; x && n < lost.size(); ++n)
    if (lost[n]) std::fill_n(x + int64_t(n) * size, size, std::numeric_limits<float>::quiet_NaN());
}

Params describe_call(Cut& cut, const Tensor& quad_q, const Tensor& quad_k, const Tensor& lin_q, const Tensor& lin_k,
                     const Tensor& v, const OptionalTensor& gate, const OptionalTensor& line, const OptionalTensor& table,
                     const OptionalTensor& state, const OptionalTensor& key_mask, const OptionalTensor& index,
                     const OptionalTensor& rows, const OptionalTensor& cu_seqlens, const OptionalTensor& seed,
                     const Ints& grid, int64_t chunk_size, bool causal, const std::string& activation, double quad_scale,
                     double lin_scale, bool by_length, double dropout_p) {
  STD_TORCH_CHECK(quad_q.dim() == 3 && v.dim() == 3 && lin_k.dim() == 3 && chunk_size > 0, "main tensors are (B, T, ·)");
  const int64_t batch = quad_q.size(0), tokens = quad_q.size(1), size = v.size(2), lin_dim = lin_k.size(2);
  const int64_t span = std::min(chunk_size, std::max<int64_t>(tokens, 1));
  const Strided q = rows_of(quad_q, quad_q, quad_q.size(2), "quad_q"), k = rows_of(quad_k, quad_q, quad_q.size(2), "quad_k");
  const auto of_chunk = [&](Tensor x) { return torch::stable::unsqueeze(torch::stable::narrow(x, 1, 0, span), 1); };
  Params p{};
  p.lin_q = rows_of(lin_q, quad_q, lin_dim, "lin_q"), p.lin_k = rows_of(lin_k, quad_q, lin_dim, "lin_k");
  const Strided values = rows_of(v, quad_q, size, "v");
  cut.pairs = describe(of_chunk(quad_q), of_chunk(quad_k), of_chunk(v), {}, line, table, {}, index, rows, seed, grid,
                       quad_scale, 0.0, dropout_p, 1.0f, "flash_mix takes");
  STD_TORCH_CHECK(!rows || rows->size(0) == 1, "rows are those of one chunk");
  cut.edges = cut_chunks(cut.pairs, BLOCK_KEYS);
  cut.pairs.p.chunk_edges = cut.edges.data();
  cut.pairs.p.chunks = int64_t(cut.edges.size()) - 1;
  p.pairs = cut.pairs.p;
  p.pairs.q = q, p.pairs.k = k, p.pairs.v = values;
  if (gate) p.gate = rows_of(*gate, quad_q, size, "gate");
  p.activation = activation_of(activation);
  p.causal = causal;
  p.lin_dim = int(lin_dim);
  // a block of keys of them stays in the second-level cache
  p.panel = std::min(p.pairs.value_dim, in_pairs(p) ? 256 : 128);
  p.panels = p.panel ? (p.pairs.value_dim + p.panel - 1) / p.panel : 0;
  p.tokens = tokens;
  if (key_mask) {
    check_cpu(*key_mask, "key_mask");
    STD_TORCH_CHECK(key_mask->scalar_type() == ScalarType::Bool && key_mask->numel() == batch * tokens,
                    "key_mask must be a bool for each token");
    p.key_mask = static_cast<const uint8_t*>(key_mask->const_data_ptr());
  }
  const auto scale = [&](int64_t length) {
    return float(by_length ? lin_scale / double(std::max<int64_t>(length, 1)) : lin_scale);
  };
  if (cu_seqlens) {
    STD_TORCH_CHECK(batch == 1 && !key_mask, "packed sequences have a batch of 1 and no mask");
    const std::vector<int64_t> at = offsets_of(cu_seqlens, tokens, "cu_seqlens");
    for (size_t n = 0; n + 1 < at.size(); ++n)
      cut_sequence(cut, 0, at[n], at[n + 1], span, chunk_size, scale(at[n + 1] - at[n]));
  } else {
    for (int64_t n = 0; n < batch; ++n) cut_sequence(cut, n, 0, tokens, span, chunk_size, scale(tokens));
  }
  p.sequences = cut.sequences.data(), p.chunks = cut.chunks.data();
  STD_TORCH_CHECK(causal || !state, "a state is carried in causal order");
  check_f32(state, "state", int64_t(cut.sequences.size()) * lin_dim * size);
  p.state = data_or_null(state);
  cut.bad.assign(cut.chunks.size() * size_t(p.panels), 0);
  p.bad = cut.bad.data();
  return p;
}

#define ACCEL_FLASH_PARAMETERS                                                                                         \
  Tensor quad_q, Tensor quad_k, Tensor lin_q, Tensor lin_k, Tensor v, OptionalTensor gate, OptionalTensor line,        \
      OptionalTensor table, OptionalTensor state, OptionalTensor key_mask, OptionalTensor index, OptionalTensor rows,  \
      OptionalTensor cu_seqlens, OptionalTensor seed, Ints grid, int64_t chunk_size, bool causal,                      \
      std::string activation, double quad_scale, double lin_scale, bool by_length, double dropout_p,                   \
      bool return_state, [[maybe_unused]] bool keep_sums
#define ACCEL_FLASH_DESCRIBED                                                                                          \
  quad_q, quad_k, lin_q, lin_k, v, gate, line, table, state, key_mask, index, rows, cu_seqlens, seed, grid, chunk_size, \
      causal, activation, quad_scale, lin_scale, by_length, dropout_p

std::tuple<Tensor, Tensor, Tensor> forward(ACCEL_FLASH_PARAMETERS) {
  Cut cut;
  Params p = describe_call(cut, ACCEL_FLASH_DESCRIBED);
  const int64_t n = int64_t(cut.sequences.size()), size = p.pairs.value_dim, panels = p.panels;
  Tensor out = empty_rows(v, size);
  Tensor sums = keep_sums ? empty_rows(v, size) : torch::stable::new_empty(v, {0});
  Tensor after = torch::stable::new_empty(v, return_state ? Ints{n, p.lin_dim, size} : Ints{0}, ScalarType::Float);
  p.out = rows_of(out, quad_q, size, "out");
  if (keep_sums) p.sums = rows_of(sums, quad_q, size, "sums");
  if (return_state) p.state_out = mutable_floats(after);
  // of few products in a sum, the rounding of one may be most of what an output is off by
  p.state_parts = in_pairs(p) && p.lin_dim <= 32 ? 2 : 1;
  const Ints part = summed_rows(p, p.lin_dim, p.panel);
  cut.states = torch::stable::new_empty(
      v, {causal ? int64_t(cut.chunks.size()) : n, panels, p.state_parts, part[0], part[1]}, ScalarType::Float);
  p.states = mutable_floats(cut.states);
  auto make = ACCEL_LEVEL(flash::flash_mix_states);
  torch::stable::parallel_for(0, n * panels, 1, [&](int64_t from, int64_t to) { make(p, from, to); });
  std::vector<char> ends = not_finite(p.state, size_t(n), p.lin_dim * size);
  cut.lost = reached(cut, cut.bad, causal, true, ends);
  p.lost = cut.lost.data();
  spoil(p.state_out, ends, p.lin_dim * size);
  std::vector<Task> tasks;
  for (int64_t c = 0; c < int64_t(cut.chunks.size()); ++c)
    for (int block = 0; block < int(p.pairs.chunks); ++block)
      if (p.pairs.tiles[cut.edges[size_t(block)]].query < cut.chunks[size_t(c)].count) tasks.push_back({c, block});
  p.tasks = tasks.data();
  auto run = ACCEL_LEVEL(flash::flash_mix_forward);
  torch::stable::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t from, int64_t to) { run(p, from, to); });
  return {out, after, sums};
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Grads backward(OptionalTensor grad_out, OptionalTensor grad_state, Tensor sums, ACCEL_FLASH_PARAMETERS, Bools needs) {
  Cut cut;
  BackwardParams b{};
  b.forward = describe_call(cut, ACCEL_FLASH_DESCRIBED);
  Params& p = b.forward;
  STD_TORCH_CHECK(needs.size() == 4, "needs: of gate, line, table and state");
  const int64_t n = int64_t(cut.sequences.size()), size = p.pairs.value_dim, panels = p.panels, chunks = int64_t(cut.chunks.size());
  Tensor upstream;
  if (grad_out) {
    upstream = *grad_out;
  } else {
    upstream = empty_rows(v, size);
    torch::stable::zero_(upstream);
  }
  b.grad_out = rows_of(upstream, quad_q, size, "grad_out");
  Tensor behind;
  if (return_state && grad_state) {
    behind = torch::stable::contiguous(*grad_state);
    check_f32(behind, "grad_state", n * p.lin_dim * size);
    b.grad_state = static_cast<const float*>(behind.const_data_ptr());
  }
  Tensor grad_quad_q = empty_rows(quad_q, p.pairs.head_dim), grad_quad_k = empty_rows(quad_q, p.pairs.head_dim);
  Tensor grad_lin_q = empty_rows(quad_q, p.lin_dim), grad_lin_k = empty_rows(quad_q, p.lin_dim);
  Tensor grad_v = empty_rows(quad_q, size);
  b.grad_quad_q = rows_of(grad_quad_q, quad_q, p.pairs.head_dim, "grad_quad_q");
  b.grad_quad_k = rows_of(grad_quad_k, quad_q, p.pairs.head_dim, "grad_quad_k");
  b.grad_lin_q = rows_of(grad_lin_q, quad_q, p.lin_dim, "grad_lin_q");
  b.grad_lin_k = rows_of(grad_lin_k, quad_q, p.lin_dim, "grad_lin_k");
  b.grad_v = rows_of(grad_v, quad_q, size, "grad_v");
  const auto floats = [&](bool wanted, Ints shape) {
    return torch::stable::new_empty(v, wanted ? shape : Ints{0}, ScalarType::Float);
  };
  Tensor grad_gate = gate && needs[0] ? empty_rows(v, size) : floats(false, {});
  if (gate && needs[0]) {
    p.sums = rows_of(sums, quad_q, size, "sums");
    b.grad_gate = rows_of(grad_gate, quad_q, size, "grad_gate");
  }
  Tensor grad_initial = floats(state && needs[3], {n, p.lin_dim, size});
  if (state && needs[3]) b.grad_initial_state = mutable_floats(grad_initial);
  b.batch_runs = std::max<int64_t>(chunks, 1), b.head_runs = b.key_runs = 1;
  SumTensors parts = allocate_sums(b, p.pairs, quad_q, {}, false, line && needs[1], table && needs[2]);

  const int64_t slots = causal ? chunks : n;
  p.state_parts = 1;
  const Ints part = summed_rows(p, p.panel, p.lin_dim);
  cut.states = floats(true, {slots, panels, part[0], part[1]});
  p.states = mutable_floats(cut.states);
  Tensor grad_states = floats(true, {slots, panels, int64_t(p.lin_dim), row_words(p, p.panel)});
  b.grad_states = mutable_floats(grad_states);
  std::vector<char> grad_bad(cut.bad.size());
  b.grad_bad = grad_bad.data();
  auto make = ACCEL_LEVEL(flash::flash_mix_grad_states);
  torch::stable::parallel_for(0, 2 * n * panels, 1, [&](int64_t from, int64_t to) { make(b, from, to); });
  std::vector<char> ends = not_finite(p.state, size_t(n), p.lin_dim * size);
  cut.lost = reached(cut, cut.bad, causal, true, ends);
  std::vector<char> begins = not_finite(b.grad_state, size_t(n), p.lin_dim * size);
  const std::vector<char> grad_lost = reached(cut, grad_bad, causal, false, begins);
  p.lost = cut.lost.data(), b.grad_lost = grad_lost.data();
  spoil(b.grad_initial_state, begins, p.lin_dim * size);
  auto run = ACCEL_LEVEL(flash::flash_mix_backward);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) { run(b, from, to); });
  auto [grad_line, grad_table] = small_gradients(b, p.pairs, quad_q);
  return {grad_quad_q, grad_quad_k, grad_lin_q, grad_lin_k, grad_v, grad_gate, grad_line, grad_table, grad_initial};
}

}  // namespace
}  // namespace accel::flash_mix

#define ACCEL_FLASH_ARGUMENTS                                                                                          \
  "Tensor quad_q, Tensor quad_k, Tensor lin_q, Tensor lin_k, Tensor v, Tensor? gate, Tensor? line, Tensor? bias_table, " \
  "Tensor? state, Tensor? key_mask, Tensor? bias_index, Tensor? rows, Tensor? cu_seqlens, Tensor? seed, int[] grid, "  \
  "int chunk_size, bool causal, str activation, float quad_scale, float lin_scale, bool by_length, float dropout_p, "  \
  "bool return_state, bool keep_sums"

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def("flash_mix_forward(" ACCEL_FLASH_ARGUMENTS ") -> (Tensor, Tensor, Tensor)");
  m.def("flash_mix_backward(Tensor? grad_out, Tensor? grad_state, Tensor sums, " ACCEL_FLASH_ARGUMENTS
        ", bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("flash_mix_forward", TORCH_BOX(&accel::flash_mix::forward));
  m.impl("flash_mix_backward", TORCH_BOX(&accel::flash_mix::backward));
}
