// torch ops accel_native::moe_route_{forward,backward}. accel/ops/moe/moe_route.py is the only caller and the place where
// the op is defined.

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "cpu/_binding.h"
#include "params.h"

namespace accel::moe_route {
namespace {

constexpr int64_t GRAIN = 1 << 14;  // logits worth a task

Params describe(const Tensor& logits, int64_t top_k, const std::string& score, bool renormalize, double eps,
                double scale) {
  check_cpu(logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) < (int64_t(1) << 30),
                  "logits must be (T, X)");
  Params p{};
  p.logits = logits.const_data_ptr();
  p.experts = logits.size(1), p.top_k = top_k;
  STD_TORCH_CHECK(top_k > 0 && top_k <= p.experts, "top_k must be from 1 to ", p.experts, ", got ", top_k);
  p.dtype = dtype_of(logits, "moe_route takes");
  if (score == "softmax") {
    p.score = Score::softmax;
  } else if (score == "softmax_topk") {
    p.score = Score::softmax_topk;
  } else if (score == "sigmoid") {
    p.score = Score::sigmoid;
  } else {
    STD_TORCH_CHECK(score == "sqrt_softplus", "there is no score ", score);
    p.score = Score::sqrt_softplus;
  }
  p.renormalize = renormalize, p.eps = float(eps), p.scale = float(scale);
  return p;
}

template <typename Run>
void each_token(const Tensor& logits, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / logits.size(1));
  if (logits.size(0) <= grain) return run(0, logits.size(0));
  torch::stable::parallel_for(0, logits.size(0), grain, run);
}

std::tuple<Tensor, Tensor> forward(Tensor logits, OptionalTensor bias, int64_t top_k, std::string score,
                                   int64_t num_groups, int64_t topk_groups, std::string group_score, bool renormalize,
                                   double eps, double scale) {
  Forward f{};
  f.p = describe(logits, top_k, score, renormalize, eps, scale);
  check_f32(bias, "bias", f.p.experts);
  f.bias = data_or_null(bias);
  STD_TORCH_CHECK(num_groups > 0 && f.p.experts % num_groups == 0 && topk_groups > 0 && topk_groups <= num_groups &&
                      top_k <= topk_groups * (f.p.experts / num_groups),
                  f.p.experts, " experts, ", num_groups, " groups, ", topk_groups, " of them, and ", top_k, " do not fit");
  f.groups = num_groups, f.chosen_groups = topk_groups, f.top2_sum = group_score == "top2_sum";
  Tensor weights = torch::stable::new_empty(logits, {logits.size(0), top_k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(logits, {logits.size(0), top_k}, ScalarType::Long);
  f.weights = mutable_floats(weights), f.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  const auto run = ACCEL_LEVEL(routing::choose);
  each_token(logits, [&](int64_t from, int64_t to) { run(f, from, to); });
  return {weights, indices};
}

Tensor backward(Tensor grad_weights, Tensor indices, Tensor logits, OptionalTensor, int64_t top_k, std::string score,
                int64_t, int64_t, std::string, bool renormalize, double eps, double scale) {
  Backward b{};
  b.p = describe(logits, top_k, score, renormalize, eps, scale);
  check_f32(grad_weights, "grad_weights", logits.size(0) * top_k);
  check_cpu(indices, "indices");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.numel() == logits.size(0) * top_k,
                  "indices must be int64 (T, K)");
  b.grad_weights = static_cast<const float*>(grad_weights.const_data_ptr());
  b.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < indices.numel(); ++i)
    STD_TORCH_CHECK(b.indices[i] >= 0 && b.indices[i] < b.p.experts, "indices holds ", b.indices[i], " beside ",
                    b.p.experts, " experts");
  Tensor grad_logits = torch::stable::new_empty(logits, {logits.size(0), b.p.experts});
  b.grad_logits = grad_logits.mutable_data_ptr();
  const auto run = ACCEL_LEVEL(routing::spread);
  each_token(logits, [&](int64_t from, int64_t to) { run(b, from, to); });
  return grad_logits;
}

}  // namespace
}  // namespace accel::moe_route

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def(
      "moe_route_forward(Tensor logits, Tensor? bias, int top_k, str score, int num_groups, int topk_groups, str "
      "group_score, bool renormalize, float eps, float scale) -> (Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor grad_weights, Tensor indices, Tensor logits, Tensor? bias, int top_k, str score, int "
      "num_groups, int topk_groups, str group_score, bool renormalize, float eps, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("moe_route_forward", TORCH_BOX(&accel::moe_route::forward));
  m.impl("moe_route_backward", TORCH_BOX(&accel::moe_route::backward));
}
