// torch ops accel_native::linear_attention_{forward,backward}: checks, allocation, threads. Every argument has the form
// that accel/ops/linear/linear_attention.py gives it, which is the only caller and the place where the op is defined.

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/_binding.h"
#include "params.h"

namespace accel::linear_attention {
namespace {

// Everything a call needs besides its tensors: what the parameters point into.
struct Call {
  Params p{};
  std::vector<Segment> key_segments, query_segments;
  std::vector<int64_t> first_key, first_query;
  std::vector<char> lost;
  Tensor states;
};

Strided strided(const Tensor& x, const char* name, int64_t readers) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, name, " must be a 4-D CPU tensor");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, name, " must have a contiguous last axis");
  STD_TORCH_CHECK(x.size(1) > 0 && readers % x.size(1) == 0, name, ": heads must divide ", readers);
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2), readers / x.size(1)};
}

// Runs of a sequence of `tokens`, chunks each. Their number follows from shapes alone, so that sums have the same order
// whatever the number of threads, and from one sequence alone, so that a batch changes no bits. In causal order a run
// that follows others has its state computed twice: only few heads are cut for the sake of the cores.
int64_t run_length(int64_t tokens, int64_t heads, bool causal) {
  constexpr int64_t LEAST = 512, TASKS = 16, ENOUGH_HEADS = 8;
  const int64_t wanted = causal && heads >= ENOUGH_HEADS ? 1 : causal ? (TASKS + heads - 1) / heads : TASKS;
  const int64_t length = std::max((tokens + wanted - 1) / wanted, LEAST);
  return (length + CHUNK - 1) / CHUNK * CHUNK;
}

void cut(std::vector<Segment>& segments, std::vector<int64_t>& first, int64_t batch, int64_t sequence, int64_t from,
         int64_t to, int64_t heads, bool causal) {
  const int64_t length = run_length(to - from, heads, causal);
  first.push_back(int64_t(segments.size()));
  for (int64_t at = from; at < to || at == from; at += length) {  // one without tokens hands its state on
    segments.push_back({batch, sequence, at, std::min(at + length, to), int64_t(segments.size()), at == from,
                        at + length >= to, 0});
    if (from == to) break;
  }
}

Call describe(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& decay, const OptionalTensor& kv,
              const OptionalTensor& k_sum, const OptionalTensor& key_mask, const OptionalTensor& cu_q,
              const OptionalTensor& cu_k, const std::string& features, bool causal, bool normalize, bool keep_state,
              double scale, double eps) {
  Call call;
  Params& p = call.p;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must be 4-D");
  p.batch = q.size(0);
  p.heads = std::max({q.size(1), k.size(1), v.size(1)});
  p.state_heads = std::max(k.size(1), v.size(1));
  p.queries = q.size(2);
  p.keys = k.size(2);
  STD_TORCH_CHECK(q.size(3) <= 512 && v.size(3) <= 512 && q.size(3) == k.size(3), "up to 512 features and values");
  STD_TORCH_CHECK(k.size(0) == p.batch && v.size(0) == p.batch && v.size(2) == p.keys, "q, k and v do not fit");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "q, k, v: one dtype");
  STD_TORCH_CHECK(p.state_heads > 0 && p.heads % p.state_heads == 0, "state heads must divide heads");
  p.features = int(q.size(3));
  p.values = int(v.size(3));
  p.dtype = dtype_of(q, "linear_attention takes");
  constexpr const char* NAMES[] = {"identity", "elu1", "relu", "squared_relu", "exp"};
  const auto* name = std::find(std::begin(NAMES), std::end(NAMES), features);
  STD_TORCH_CHECK(name != std::end(NAMES), "an unknown map: ", features);
  p.map = Map(name - std::begin(NAMES));
  p.causal = causal;
  p.normalize = normalize;
  p.keep_state = keep_state;
  p.scale = float(scale);
  p.eps = float(eps);
  p.q = strided(q, "q", p.heads);
  p.k = strided(k, "k", p.state_heads);
  p.v = strided(v, "v", p.state_heads);
  STD_TORCH_CHECK(!causal || p.queries == p.keys, "causal needs as many queries as keys");
  if (decay) {
    const bool whole = decay->size(0) == 1 && decay->size(2) == 1 && !(p.batch == 1 && p.keys == 1);
    check_f32(decay, "decay", whole ? p.state_heads : p.batch * p.state_heads * p.keys);
    p.decay = data_or_null(decay);
    p.decay_batch = whole ? 0 : p.state_heads * p.keys;
    p.decay_head = whole ? 1 : p.keys;
    p.decay_token = whole ? 0 : 1;
  }
  if (key_mask) {
    check_cpu(*key_mask, "key_mask");
    STD_TORCH_CHECK(key_mask->scalar_type() == ScalarType::Bool && key_mask->numel() == p.batch * p.keys,
                    "key_mask must be a bool for each key");
    p.key_mask = static_cast<const uint8_t*>(key_mask->const_data_ptr());
  }
  if (cu_q) {
    STD_TORCH_CHECK(p.batch == 1, "packed sequences have a batch of 1");
    const std::vector<int64_t> at_q = offsets_of(cu_q, p.queries, "cu_q");
    const std::vector<int64_t> at_k = cu_k ? offsets_of(cu_k, p.keys, "cu_k") : at_q;
    STD_TORCH_CHECK(at_q.size() == at_k.size() && at_k.back() == p.keys, "as many sequences of queries as of keys");
    STD_TORCH_CHECK(!causal || at_q == at_k, "causal needs queries and keys packed alike");
    p.sequences = int64_t(at_q.size()) - 1;
    for (int64_t n = 0; n < p.sequences; ++n) {
      cut(call.key_segments, call.first_key, 0, n, at_k[n], at_k[n + 1], p.state_heads, causal);
      cut(call.query_segments, call.first_query, 0, n, at_q[n], at_q[n + 1], p.state_heads, causal);
    }
  } else {
    p.sequences = p.batch;
    for (int64_t n = 0; n < p.batch; ++n) {
      cut(call.key_segments, call.first_key, n, n, 0, p.keys, p.state_heads, causal);
      cut(call.query_segments, call.first_query, n, n, 0, p.queries, p.state_heads, causal);
    }
  }
  call.first_key.push_back(int64_t(call.key_segments.size()));
  call.first_query.push_back(int64_t(call.query_segments.size()));
  if (!causal) {
    for (Segment& s : call.key_segments) s.slot = call.first_query[size_t(s.sequence)];
    for (Segment& s : call.query_segments) s.slot = call.first_key[size_t(s.sequence)];
  }
  check_f32(kv, "kv", p.sequences * p.state_heads * p.features * p.values);
  check_f32(k_sum, "k_sum", p.sequences * p.state_heads * p.features);
  p.kv = data_or_null(kv);
  p.k_sum = data_or_null(k_sum);
  return call;
}

// Pointers into a call that has reached its place.
void point(Call& call) {
  call.p.key_segments = call.key_segments.data();
  call.p.query_segments = call.query_segments.data();
  call.p.first_key_segment = call.first_key.data();
  call.p.first_query_segment = call.first_query.data();
}

int64_t slot_size(const Params& p) { return int64_t(p.features) * p.values + p.features; }

bool needs_slots(const Call& call) {
  return !call.p.causal || int64_t(call.key_segments.size()) > call.p.sequences;
}

// The states where runs begin, or those of all keys.
void make_states(Call& call, const Tensor& like) {
  if (!needs_slots(call)) return;
  Params& p = call.p;
  const int64_t runs = int64_t(call.key_segments.size());
  call.states = torch::stable::new_empty(like, {runs, p.state_heads, slot_size(p)}, ScalarType::Float);
  call.lost.assign(size_t(runs * p.state_heads), 0);
  p.states = {mutable_floats(call.states), call.lost.data()};
  auto make = ACCEL_LEVEL(linear::linear_attention_states);
  torch::stable::parallel_for(0, runs * p.state_heads, 1, [&](int64_t from, int64_t to) { make(p, from, to); });
  auto join = ACCEL_LEVEL(linear::linear_attention_join);
  torch::stable::parallel_for(0, p.sequences * p.state_heads, 1, [&](int64_t from, int64_t to) { join(p, from, to); });
}

// Memory for (B, heads, tokens, size) in the order of `like`: heads inside tokens where it has them so.
Tensor empty_like_layout(const Tensor& like, int64_t heads, int64_t tokens, int64_t size) {
  const bool inside = like.size(1) > 1 && like.stride(1) < like.stride(2);
  if (!inside) return torch::stable::new_empty(like, {like.size(0), heads, tokens, size});
  return torch::stable::transpose(torch::stable::new_empty(like, {like.size(0), tokens, heads, size}), 1, 2);
}

Tensor floats(const Tensor& like, bool wanted, std::vector<int64_t> shape) {
  if (!wanted) shape = {0};
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, OptionalTensor decay,
                                                   OptionalTensor kv, OptionalTensor k_sum, OptionalTensor key_mask,
                                                   OptionalTensor cu_q, OptionalTensor cu_k, std::string features,
                                                   bool causal, bool normalize, bool return_state, bool keep,
                                                   double scale, double eps) {
  Call call = describe(q, k, v, decay, kv, k_sum, key_mask, cu_q, cu_k, features, causal, normalize, return_state,
                       scale, eps);
  point(call);
  Params& p = call.p;
  const int64_t n = p.sequences, hs = p.state_heads;
  Tensor out = empty_like_layout(q, p.heads, p.queries, p.values);
  Tensor kv_out = floats(q, return_state, {n, hs, int64_t(p.features), int64_t(p.values)});
  Tensor sum_out = floats(q, return_state && normalize, {n, hs, int64_t(p.features)});
  Tensor den = floats(q, normalize && keep, {p.batch, p.heads, p.queries});
  p.out = strided(out, "out", p.heads);
  p.den = normalize && keep ? mutable_floats(den) : nullptr;
  p.kv_out = return_state ? mutable_floats(kv_out) : nullptr;
  p.k_sum_out = return_state && normalize ? mutable_floats(sum_out) : nullptr;
  make_states(call, q);
  auto run = ACCEL_LEVEL(linear::linear_attention_forward);
  torch::stable::parallel_for(0, int64_t(call.query_segments.size()) * hs, 1,
                              [&](int64_t from, int64_t to) { run(p, from, to); });
  return {out, kv_out, sum_out, den};
}

// Numbers the states that runs keep for the gradient of decay; how many there are.
int64_t number_kept(Call& call) {
  int64_t kept = 0;
  for (size_t n = 0; n < call.query_segments.size(); ++n) {
    const int64_t tokens = call.query_segments[n].to - call.query_segments[n].from;
    call.query_segments[n].kept = call.key_segments[n].kept = kept;
    kept += std::max<int64_t>(tokens - 1, 0) / (STRETCH * CHUNK);
  }
  return kept;
}

// The gradient of a decay that is one for all tokens of a head.
Tensor sum_over_tokens(const Params& p, const Tensor& decay, const Tensor& each) {
  Tensor grad = torch::stable::new_empty(decay, {1, p.state_heads, 1});
  const float* from = static_cast<const float*>(each.const_data_ptr());
  for (int64_t hs = 0; hs < p.state_heads; ++hs) {
    double sum = 0.0;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t t = 0; t < p.keys; ++t) sum += double(from[(b * p.state_heads + hs) * p.keys + t]);
    mutable_floats(grad)[hs] = float(sum);
  }
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    OptionalTensor grad_out, OptionalTensor grad_kv, OptionalTensor grad_k_sum, Tensor out, Tensor den, Tensor q,
    Tensor k, Tensor v, OptionalTensor decay, OptionalTensor kv, OptionalTensor k_sum, OptionalTensor key_mask,
    OptionalTensor cu_q, OptionalTensor cu_k, std::string features, bool causal, bool normalize, bool return_state,
    bool /*keep*/, double scale, double eps, Bools needs) {
  Call call = describe(q, k, v, decay, kv, k_sum, key_mask, cu_q, cu_k, features, causal, normalize, return_state,
                       scale, eps);
  point(call);
  STD_TORCH_CHECK(needs.size() == 3, "needs: of decay, kv and k_sum");
  Params& p = call.p;
  const int64_t n = p.sequences, hs = p.state_heads, F = p.features, E = p.values;
  const int64_t slots = int64_t(call.query_segments.size());
  STD_TORCH_CHECK(out.size(1) == p.heads && out.size(2) == p.queries && out.size(3) == E, "out does not fit");
  STD_TORCH_CHECK(out.scalar_type() == q.scalar_type(), "out must have the dtype of q");
  p.out = strided(out, "out", p.heads);
  if (normalize) check_f32(den, "den", p.batch * p.heads * p.queries);
  p.den = normalize ? const_cast<float*>(static_cast<const float*>(den.const_data_ptr())) : nullptr;
  make_states(call, q);

  BackwardParams b{};
  if (grad_out) {
    STD_TORCH_CHECK(grad_out->scalar_type() == q.scalar_type() && grad_out->size(1) == p.heads &&
                        grad_out->size(2) == p.queries && grad_out->size(3) == E,
                    "grad_out must have the shape and dtype of the output");
    b.grad_out = strided(*grad_out, "grad_out", p.heads);
  }
  Tensor by_sum = floats(q, normalize, {p.batch, p.heads, p.queries});
  b.by_sum = normalize ? mutable_floats(by_sum) : nullptr;
  std::vector<Tensor> keep;
  const auto contiguous = [&](const OptionalTensor& x, const char* name, int64_t numel) -> const float* {
    if (!x || x->numel() == 0) return nullptr;
    keep.push_back(torch::stable::contiguous(*x));
    check_f32(keep.back(), name, numel);
    return static_cast<const float*>(keep.back().const_data_ptr());
  };
  b.grad_kv = contiguous(grad_kv, "grad_kv", n * hs * F * E);
  b.grad_k_sum = contiguous(grad_k_sum, "grad_k_sum", n * hs * F);
  Tensor grad_q = empty_like_layout(q, q.size(1), p.queries, F);
  Tensor grad_k = empty_like_layout(k, k.size(1), p.keys, F);
  Tensor grad_v = empty_like_layout(v, v.size(1), p.keys, E);
  b.grad_q = strided(grad_q, "grad_q", p.heads);
  b.grad_k = strided(grad_k, "grad_k", hs);
  b.grad_v = strided(grad_v, "grad_v", hs);
  Tensor part_q = floats(q, p.q.share > 1, {p.batch, p.heads, p.queries, F});
  Tensor part_k = floats(q, p.k.share > 1, {p.batch, hs, p.keys, F});
  Tensor part_v = floats(q, p.v.share > 1, {p.batch, hs, p.keys, E});
  b.part_q = p.q.share > 1 ? mutable_floats(part_q) : nullptr;
  b.part_k = p.k.share > 1 ? mutable_floats(part_k) : nullptr;
  b.part_v = p.v.share > 1 ? mutable_floats(part_v) : nullptr;
  Tensor grad_initial_kv = floats(q, kv && needs[1], {n, hs, F, E});
  Tensor grad_initial_sum = floats(q, k_sum && needs[2], {n, hs, F});
  b.grad_initial_kv = kv && needs[1] ? mutable_floats(grad_initial_kv) : nullptr;
  b.grad_initial_k_sum = k_sum && needs[2] ? mutable_floats(grad_initial_sum) : nullptr;
  const bool decays = decay && needs[0];
  Tensor grad_decay = floats(q, decays, {p.batch, hs, p.keys});
  Tensor kept = floats(q, decays, {decays ? number_kept(call) : 0, hs, slot_size(p)});
  b.grad_decay = decays ? mutable_floats(grad_decay) : nullptr;
  b.kept = decays ? mutable_floats(kept) : nullptr;
  b.forward = p;

  const int64_t runs = int64_t(call.key_segments.size());
  Tensor grad_states = floats(q, needs_slots(call), {slots, hs, slot_size(p)});
  std::vector<char> grad_lost(needs_slots(call) ? size_t(slots * hs) : 0, 0);
  auto of_queries = ACCEL_LEVEL(linear::linear_attention_backward_q);
  torch::stable::parallel_for(0, slots * hs, 1, [&](int64_t from, int64_t to) { of_queries(b, from, to); });
  if (needs_slots(call)) {
    b.grad_states = {mutable_floats(grad_states), grad_lost.data()};
    auto make = ACCEL_LEVEL(linear::linear_attention_grad_states);
    torch::stable::parallel_for(0, slots * hs, 1, [&](int64_t from, int64_t to) { make(b, from, to); });
    auto join = ACCEL_LEVEL(linear::linear_attention_grad_join);
    torch::stable::parallel_for(0, n * hs, 1, [&](int64_t from, int64_t to) { join(b, from, to); });
  }
  auto of_keys = ACCEL_LEVEL(linear::linear_attention_backward_k);
  torch::stable::parallel_for(0, runs * hs, 1, [&](int64_t from, int64_t to) { of_keys(b, from, to); });
  auto sum = ACCEL_LEVEL(linear::linear_attention_sum_heads);
  const int64_t shares[] = {p.q.share, p.k.share, p.v.share};
  const int64_t rows[] = {p.batch * q.size(1) * p.queries, p.batch * k.size(1) * p.keys, p.batch * v.size(1) * p.keys};
  for (int which = 0; which < 3; ++which)
    if (shares[which] > 1)
      torch::stable::parallel_for(0, rows[which], 64, [&](int64_t from, int64_t to) { sum(b, which, from, to); });
  if (decays && !p.decay_token) grad_decay = sum_over_tokens(p, *decay, grad_decay);
  return {grad_q, grad_k, grad_v, grad_decay, grad_initial_kv, grad_initial_sum};
}

}  // namespace
}  // namespace accel::linear_attention

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def(
      "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? kv, Tensor? k_sum, Tensor? "
      "key_mask, Tensor? cu_q, Tensor? cu_k, str features, bool causal, bool normalize, bool return_state, bool "
      "keep, float scale, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_backward(Tensor? grad_out, Tensor? grad_kv, Tensor? grad_k_sum, Tensor out, Tensor den, "
      "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? kv, Tensor? k_sum, Tensor? key_mask, Tensor? cu_q, "
      "Tensor? cu_k, str features, bool causal, bool normalize, bool return_state, bool keep, float scale, float eps, "
      "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&accel::linear_attention::forward));
  m.impl("linear_attention_backward", TORCH_BOX(&accel::linear_attention::backward));
}
