// torch op accel_native::linear_attention_step. accel/ops/linear/linear_attention_step.py is the only caller and the place
// where the op is defined.

#include "params.h"

#include <algorithm>
#include <cmath>

#include "cpu/_binding.h"

namespace accel::linear_attention_step {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // floats of states that are worth waking a thread for

Rows rows_of(const Tensor& x, const char* name, int64_t batch, int64_t size, ScalarType dtype) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == dtype && x.dim() == 4, name, " must be (B, H, 1, ·) beside q");
  STD_TORCH_CHECK(x.size(0) == batch && x.size(1) > 0 && x.size(2) == 1 && x.size(3) == size, name,
                  " does not fit the state");
  return {x.const_data_ptr(), x.size(1), x.stride(0), x.stride(1), x.stride(3)};
}

// (B, H, 1, E) beside q. Not by the op new_empty, which would be looked up by its name: a step of a small model takes
// little longer.
Tensor empty_rows(const Tensor& q, int64_t batch, int64_t heads, int64_t values) {
  const int64_t sizes[] = {batch, heads, 1, values}, strides[] = {heads * values, values, values, 1};
  int32_t dtype;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor step(Tensor q, Tensor k, Tensor v, Tensor kv, OptionalTensor k_sum, OptionalTensor decay, int64_t map,
            double scale, double eps) {
  STD_TORCH_CHECK(kv.is_cpu() && kv.scalar_type() == ScalarType::Float && kv.dim() == 4,
                  "kv must be a float32 CPU tensor (B, Hs, D, E)");
  Params p{};
  const int64_t batch = kv.size(0);
  p.state_heads = kv.size(1), p.features = kv.size(2), p.values = kv.size(3);
  const int64_t size = p.features * p.values;
  STD_TORCH_CHECK(batch > 0 && p.state_heads > 0 && size > 0, "kv is empty");
  p.kv_batch = kv.stride(0), p.kv_head = kv.stride(1);
  p.by_columns = !(kv.stride(3) == 1 && kv.stride(2) == p.values);
  STD_TORCH_CHECK(!p.by_columns || (kv.stride(2) == 1 && kv.stride(3) == p.features), "kv has gaps within a head");
  STD_TORCH_CHECK((p.state_heads == 1 || p.kv_head >= size) &&
                      (batch == 1 || p.kv_batch >= (p.state_heads - 1) * p.kv_head + size),
                  "heads of kv overlap");
  const ScalarType dtype = q.scalar_type();
  p.dtype = dtype_of(q, "linear_attention_step takes");
  p.q = rows_of(q, "q", batch, p.features, dtype);
  p.k = rows_of(k, "k", batch, p.features, dtype);
  p.v = rows_of(v, "v", batch, p.values, dtype);
  p.heads = std::max(p.q.heads, p.state_heads);
  STD_TORCH_CHECK(p.heads % p.state_heads == 0 && p.heads % p.q.heads == 0 && p.state_heads % p.k.heads == 0 &&
                      p.state_heads % p.v.heads == 0 && p.state_heads == std::max(p.k.heads, p.v.heads),
                  "the heads of q, k, v and kv do not divide each other");
  if (k_sum) {
    STD_TORCH_CHECK(k_sum->is_cpu() && k_sum->scalar_type() == ScalarType::Float && k_sum->dim() == 3 &&
                        k_sum->size(0) == batch && k_sum->size(1) == p.state_heads && k_sum->size(2) == p.features &&
                        k_sum->stride(2) == 1,
                    "k_sum must be float32 (B, Hs, D) beside kv");
    p.sum_batch = k_sum->stride(0), p.sum_head = k_sum->stride(1);
    STD_TORCH_CHECK((p.state_heads == 1 || p.sum_head >= p.features) &&
                        (batch == 1 || p.sum_batch >= (p.state_heads - 1) * p.sum_head + p.features),
                    "heads of k_sum overlap");
    p.k_sum = mutable_floats(*k_sum);
  }
  if (decay) {
    const bool each = decay->dim() == 3;
    STD_TORCH_CHECK(decay->is_cpu() && decay->scalar_type() == ScalarType::Float && (each || decay->dim() == 1) &&
                        decay->size(each ? 1 : 0) == p.state_heads && (!each || decay->size(0) == batch),
                    "decay must be float32 (Hs,) or (B, Hs, 1)");
    p.decay_batch = each ? decay->stride(0) : 0, p.decay_head = decay->stride(each ? 1 : 0);
    p.decay = data_or_null(decay);
  }
  STD_TORCH_CHECK(map >= 0 && map <= int64_t(Map::exp), "there is no feature map ", map);
  STD_TORCH_CHECK(std::isfinite(scale) && std::isfinite(eps) && eps >= 0.0, "scale or eps is out of range");
  p.map = Map(map), p.scale = float(scale), p.eps = float(eps);
  Tensor out = empty_rows(q, batch, p.heads, p.values);
  p.kv = mutable_floats(kv), p.out = out.mutable_data_ptr();
  const auto run = ACCEL_LEVEL(linear_step::update);
  const int64_t tasks = batch * p.state_heads, grain = std::max<int64_t>(1, GRAIN / size);
  if (tasks <= grain) {
    run(p, 0, tasks);
  } else {
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t from, int64_t to) { run(p, from, to); });
  }
  return out;
}

}  // namespace
}  // namespace accel::linear_attention_step

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def(
      "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) kv, Tensor(b!)? k_sum, Tensor? decay, "
      "int map, float scale, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("linear_attention_step", TORCH_BOX(&accel::linear_attention_step::step));
}
