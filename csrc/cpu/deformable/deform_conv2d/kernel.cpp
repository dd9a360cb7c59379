// Deformable convolution on the CPU, one instruction-set level: see forward.h and backward.h.

#include "backward.h"
#include "forward.h"

namespace accel::ACCEL_ISA::deform {

// f(a value of the element type)
template <typename F>
void with_type(Dtype dtype, F f) {
  if (dtype == Dtype::f32) f(float{});
  if (dtype == Dtype::bf16) f(bf16{});
  if (dtype == Dtype::f16) f(fp16{});
}

int64_t weight_words(const Params& p) {
  int64_t n = 0;
  with_type(p.dtype, [&](auto x) { n = panel_words<decltype(x)>(p); });
  return p.groups * panels(p) * n;
}

void pack_weight(const ForwardParams& f, int64_t from, int64_t to) {
  with_type(f.p.dtype, [&](auto x) { pack_weight<decltype(x)>(f, from, to); });
}

void pack_image(const ForwardParams& f, int64_t from, int64_t to) {
  with_type(f.p.dtype, [&](auto x) { pack_image<decltype(x)>(f, from, to); });
}

void forward(const ForwardParams& f, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  with_type(f.p.dtype, [&](auto x) { Forward<decltype(x)>(f).run(from, to); });
}

void backward(const BackwardParams& b, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  with_type(b.p.dtype, [&](auto x) { Backward<decltype(x)>(b).run(from, to); });
}

void unpack_grad_weight(const BackwardParams& b, int64_t from, int64_t to) {
  with_type(b.p.dtype, [&](auto x) { unpack_grad_weight<decltype(x)>(b, from, to); });
}

void sum_bias(const BackwardParams& b, int64_t from, int64_t to) {
  with_type(b.p.dtype, [&](auto x) { sum_bias<decltype(x)>(b, from, to); });
}

}  // namespace accel::ACCEL_ISA::deform
