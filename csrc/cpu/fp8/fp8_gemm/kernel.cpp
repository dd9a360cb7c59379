// Products of eight-bit numbers on the CPU, one instruction-set level: see few.h, many.h and turned.h.

#include "few.h"
#include "many.h"
#include "turned.h"

namespace accel::ACCEL_ISA::fp8 {
namespace {

// f(A{}) with the type of a's elements.
template <typename G>
auto with_a(const Params& p, G f) {
  [[maybe_unused]] FlushSubnormals flush;
  switch (p.a_kind) {
    case Kind::bf16: return f(bf16{});
    case Kind::f16: return f(fp16{});
    case Kind::e4m3: return f(e4m3{});
    case Kind::e5m2: return f(e5m2{});
    default: return f(float{});
  }
}

template <typename A, typename F>
void multiply(const Params& p) {
  if (p.few()) return multiply_few<A, F>(p);
  if (p.turned) return Turned<A, F>(p).run();
  Many<A, F>(p).run();
}

}  // namespace

int64_t panel_words(const Params& p) {
  return with_a(p, [&](auto x) { return Panels<decltype(x)>(p).words(); });
}

void pack(const Params& p, int64_t from, int64_t to) {
  with_a(p, [&](auto x) { Panels<decltype(x)>(p).pack(from, to); });
}

void multiply(const Params& p) {
  with_a(p, [&](auto x) {
    using A = decltype(x);
    p.b_kind == Kind::e4m3 ? multiply<A, e4m3>(p) : multiply<A, e5m2>(p);
  });
}

}  // namespace accel::ACCEL_ISA::fp8
