// Products of eight-bit numbers on the CPU, one instruction-set level: see few.h and many.h.

#include "few.h"
#include "many.h"

namespace accel::ACCEL_ISA::fp8 {
namespace {

template <typename A, typename F>
void multiply(const Params& p) {
  if (p.few()) return multiply_few<A, F>(p);
  Many<A, F>(p).run();
}

template <typename A>
void multiply(const Params& p) {
  p.b_kind == Kind::e4m3 ? multiply<A, e4m3>(p) : multiply<A, e5m2>(p);
}

}  // namespace

void multiply(const Params& p) {
  [[maybe_unused]] FlushSubnormals flush;
  switch (p.a_kind) {
    case Kind::f32: return multiply<float>(p);
    case Kind::bf16: return multiply<bf16>(p);
    case Kind::f16: return multiply<fp16>(p);
    case Kind::e4m3: return multiply<e4m3>(p);
    case Kind::e5m2: return multiply<e5m2>(p);
  }
}

}  // namespace accel::ACCEL_ISA::fp8
