// torch ops accel_native::moe_experts_{forward,backward}: checks, allocation, threads. Every argument has the form that
// accel/ops/moe/moe_experts.py gives it, which is the only caller and the place where the op is defined.

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/moe/sort.h"
#include "cpu/moe/grouped_linear/run.h"
#include "params.h"

namespace accel::moe_experts {
namespace {

constexpr int64_t TOKENS = 16;  // of a task that adds up choices

Function function_of(const std::string& name) {
  constexpr const char* NAMES[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2"};
  const auto* found = std::find(std::begin(NAMES), std::end(NAMES), name);
  STD_TORCH_CHECK(found != std::end(NAMES), "an unknown function: ", name);
  return Function(found - std::begin(NAMES));
}

// A call's sizes, and its choices sorted by expert.
struct Call {
  int64_t tokens, channels, choices, experts;
  Gate gate;
  Dtype dtype;
  bool transposed;
  std::vector<int64_t> choice, place;  // of each sorted row, t · K + k; the row of each choice, −1 for none
  std::vector<int64_t> starts;         // (X + 1,): where each expert's rows begin
  std::vector<int64_t> token;   // of each sorted row
  std::vector<float> weights;   // likewise
  const float *weights_given, *gate_up_bias, *down_bias;
  const int64_t* indices;

  const int64_t* offsets() const { return starts.data(); }
  int64_t rows() const { return starts.back(); }
  // Rows of a tensor of tokens, gathered by the choices.
  Rows gathered(const Tensor& x) const { return {x.const_data_ptr(), channels, token.data()}; }
};

Call describe(const Tensor& x, const Tensor& weights, const Tensor& gate_up, const Tensor& down,
              const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const Tensor& indices,
              const std::string& function, double alpha, double limit, double shift, bool gated, bool interleaved,
              bool transposed) {
  Call call{};
  check_cpu(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && indices.dim() == 2 && indices.size(0) == x.size(0), "x and indices do not fit");
  STD_TORCH_CHECK(gate_up.dim() == 3 && down.dim() == 3 && down.size(0) == gate_up.size(0), "projections do not fit");
  call.tokens = x.size(0), call.channels = x.size(1), call.choices = indices.size(1), call.experts = down.size(0);
  call.gate = {function_of(function), float(alpha), float(limit), float(shift),
               gated,                 interleaved,  down.size(transposed ? 1 : 2)};
  call.dtype = dtype_of(x, "moe_experts takes");
  call.transposed = transposed;
  const int64_t c = call.channels, j = call.gate.outputs(), inner = call.gate.inner;
  check_matrices(gate_up, x, transposed ? c : j, transposed ? j : c, "gate_up_proj");
  check_matrices(down, x, transposed ? inner : c, transposed ? c : inner, "down_proj");
  check_f32(gate_up_bias, "gate_up_bias", call.experts * j);
  check_f32(down_bias, "down_bias", call.experts * c);
  check_f32(weights, "weights", indices.numel());
  call.indices = indices_of(indices, "indices");
  call.weights_given = data_or_null(weights);
  call.gate_up_bias = data_or_null(gate_up_bias);
  call.down_bias = data_or_null(down_bias);
  const int64_t all = indices.numel();
  std::vector<int64_t> counts(size_t(call.experts));
  call.choice.resize(size_t(all)), call.place.resize(size_t(all)), call.starts.resize(size_t(call.experts + 1));
  moe::planning::sort(call.indices, {all, call.experts, -1, 1, all}, call.choice.data(), call.place.data(), counts.data(),
                      call.starts.data());
  call.token.resize(size_t(call.rows()));
  call.weights.resize(size_t(call.rows()));
  for (size_t r = 0; r < call.token.size(); ++r) {
    call.token[r] = call.choice[r] / call.choices;
    call.weights[r] = call.weights_given[call.choice[r]];
  }
  return call;
}

// (T, C) in the dtype of x from fp32 rows; `weights` null: all are 1.
void combine(const Call& call, const Tensor& rows, const float* weights, Tensor& out) {
  Combine p{data_or_null(rows), weights, call.place.data(), call.choices, call.channels, out.mutable_data_ptr(),
            call.dtype, {}};
  Plan plan = Plan::rows(call.tokens, TOKENS);
  p.tasks = plan.tasks();
  auto run = ACCEL_LEVEL(moe::moe_experts_combine);
  work(p.tasks, [&] { run(p); });
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}, ScalarType::Float); }

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weights, Tensor gate_up, Tensor down, OptionalTensor gate_up_bias,
                                   OptionalTensor down_bias, Tensor indices, std::string function, double alpha,
                                   double limit, double shift, bool gated, bool interleaved, bool transposed, bool keep) {
  const Call call = describe(x, weights, gate_up, down, gate_up_bias, down_bias, indices, function, alpha, limit, shift,
                             gated, interleaved, transposed);
  const int64_t outputs = call.gate.outputs(), inner = call.gate.inner, rows = call.rows();
  Tensor hidden = keep ? torch::stable::new_empty(x, {indices.numel(), outputs}) : torch::stable::new_empty(x, {0});
  if (keep) {
    const size_t row = size_t(outputs) * hidden.element_size();
    std::memset(static_cast<char*>(hidden.mutable_data_ptr()) + size_t(rows) * row, 0,
                size_t(indices.numel() - rows) * row);
  }
  Tensor active = torch::stable::new_empty(x, {rows, inner});
  const bool two = gated && !interleaved;
  First p{{call.gathered(x), gate_up.const_data_ptr(), call.experts, outputs, call.channels, transposed,
           two ? inner : 0, call.dtype, {}},
          call.gate, call.gate_up_bias, keep ? hidden.mutable_data_ptr() : nullptr, active.mutable_data_ptr()};
  Plan plan = Plan::product(call.offsets(), call.experts, two ? inner : outputs, two ? 2 : 1);
  p.product.tasks = plan.tasks();
  auto run = ACCEL_LEVEL(moe::moe_experts_first);
  work(p.product.tasks, [&] { run(p); });
  Tensor made = torch::stable::new_empty(x, {rows, call.channels}, ScalarType::Float);
  grouped_products({active.const_data_ptr(), inner, nullptr}, down, call.offsets(), transposed, call.down_bias, made,
                   true, call.dtype);
  Tensor out = torch::stable::new_empty(x, {call.tokens, call.channels});
  combine(call, made, call.weights_given, out);
  return {out, hidden};
}

Tensor router_gradient(const Call& call, const std::vector<float>& dots, const Tensor& grad_out, const Tensor& like) {
  Tensor grad = torch::stable::new_empty(like, {call.tokens, call.choices}, ScalarType::Float);
  Router p{dots.data(), (call.gate.inner + FEW_COLUMNS - 1) / FEW_COLUMNS, call.rows(), grad_out.const_data_ptr(),
           call.down_bias, call.indices, call.place.data(), call.choices, call.channels, mutable_floats(grad),
           call.dtype, {}};
  Plan plan = Plan::rows(call.tokens, TOKENS);
  p.tasks = plan.tasks();
  auto run = ACCEL_LEVEL(moe::moe_experts_router);
  work(p.tasks, [&] { run(p); });
  return grad;
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Grads backward(Tensor grad_out, Tensor hidden, Tensor x, Tensor weights, Tensor gate_up, Tensor down,
               OptionalTensor gate_up_bias, OptionalTensor down_bias, Tensor indices, std::string function, double alpha,
               double limit, double shift, bool gated, bool interleaved, bool transposed, bool, Bools needs) {
  const Call call = describe(x, weights, gate_up, down, gate_up_bias, down_bias, indices, function, alpha, limit, shift,
                             gated, interleaved, transposed);
  const int64_t outputs = call.gate.outputs(), inner = call.gate.inner, rows = call.rows(), c = call.channels;
  const bool want_x = needs.at(0), want_weights = needs.at(1), want_gate_up = needs.at(2), want_down = needs.at(3);
  const bool want_gate_up_bias = needs.at(4) && gate_up_bias, want_down_bias = needs.at(5) && down_bias;
  check_cpu(grad_out, "grad_out");
  check_cpu(hidden, "hidden");
  STD_TORCH_CHECK(grad_out.numel() == x.numel() && grad_out.scalar_type() == x.scalar_type(), "grad_out must be as x");
  STD_TORCH_CHECK(hidden.numel() == indices.numel() * outputs && hidden.scalar_type() == x.scalar_type(),
                  "the forward has not kept what its backward needs");
  const bool behind = want_x || want_gate_up || want_gate_up_bias;
  Tensor grad_hidden = behind ? torch::stable::new_empty(x, {rows, outputs}) : nothing(x);
  Tensor weighed = want_down ? torch::stable::new_empty(x, {rows, inner}) : nothing(x);
  std::vector<float> dots;
  if (want_weights) dots.assign(size_t((inner + FEW_COLUMNS - 1) / FEW_COLUMNS * rows), 0.0f);
  if (behind || want_weights || want_down) {
    const bool product = behind || want_weights;
    Behind p{{call.gathered(grad_out), product ? down.const_data_ptr() : nullptr, call.experts, inner, c, !transposed, 0,
              call.dtype, {}},
             call.gate, hidden.const_data_ptr(), call.weights.data(),
             behind ? grad_hidden.mutable_data_ptr() : nullptr, want_down ? weighed.mutable_data_ptr() : nullptr,
             want_weights ? dots.data() : nullptr, rows};
    Plan plan = Plan::product(call.offsets(), call.experts, inner, 1);
    p.product.tasks = plan.tasks();
    auto run = ACCEL_LEVEL(moe::moe_experts_behind);
    work(p.product.tasks, [&] { run(p); });
  }
  const Rows of_x = call.gathered(x), of_out = call.gathered(grad_out);
  const Rows of_hidden{grad_hidden.const_data_ptr(), outputs, nullptr}, of_inner{weighed.const_data_ptr(), inner, nullptr};
  Tensor grad_x = nothing(x), grad_gate_up = nothing(x), grad_down = nothing(x);
  Tensor grad_gate_up_bias = nothing(x), grad_down_bias = nothing(x);
  Tensor grad_weights = want_weights ? router_gradient(call, dots, grad_out, x) : nothing(x);
  if (want_down) {
    grad_down = torch::stable::new_empty(x, {call.experts, down.size(1), down.size(2)});
    outer_products(transposed ? of_inner : of_out, transposed ? of_out : of_inner, grad_down, call.offsets(), call.dtype);
  }
  if (want_down_bias) {
    grad_down_bias = torch::stable::new_empty(x, {call.experts, c}, ScalarType::Float);
    sum_groups(of_out, call.weights.data(), grad_down_bias, call.offsets(), call.dtype);
  }
  if (want_gate_up) {
    grad_gate_up = torch::stable::new_empty(x, {call.experts, gate_up.size(1), gate_up.size(2)});
    outer_products(transposed ? of_x : of_hidden, transposed ? of_hidden : of_x, grad_gate_up, call.offsets(), call.dtype);
  }
  if (want_gate_up_bias) {
    grad_gate_up_bias = torch::stable::new_empty(x, {call.experts, outputs}, ScalarType::Float);
    sum_groups(of_hidden, nullptr, grad_gate_up_bias, call.offsets(), call.dtype);
  }
  if (want_x) {
    Tensor made = torch::stable::new_empty(x, {rows, c}, ScalarType::Float);
    grouped_products(of_hidden, gate_up, call.offsets(), !transposed, nullptr, made, true, call.dtype);
    grad_x = torch::stable::new_empty(x, {call.tokens, c});
    combine(call, made, nullptr, grad_x);
  }
  return {grad_x, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias};
}

}  // namespace
}  // namespace accel::moe_experts

#define ACCEL_MOE_EXPERTS_ARGUMENTS                                                                                  \
  "Tensor x, Tensor weights, Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, "       \
  "Tensor indices, str function, float alpha, float limit, float shift, bool gated, bool interleaved, bool transposed, " \
  "bool keep"

STABLE_TORCH_LIBRARY_FRAGMENT(accel_native, m) {
  m.def("moe_experts_forward(" ACCEL_MOE_EXPERTS_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("moe_experts_backward(Tensor grad_out, Tensor hidden, " ACCEL_MOE_EXPERTS_ARGUMENTS
        ", bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(accel_native, CPU, m) {
  m.impl("moe_experts_forward", TORCH_BOX(&accel::moe_experts::forward));
  m.impl("moe_experts_backward", TORCH_BOX(&accel::moe_experts::backward));
}
