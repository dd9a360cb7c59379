// Which instruction-set level the CPU kernels run at; decided once at load time from what the processor has.
#pragma once

namespace accel {

enum class Isa : int { portable, avx2, avx512, avx512_bf16 };

constexpr const char* ISA_NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa highest_isa();    // that this processor has, of those built
Isa best_isa();       // the fastest of them, in use from the start
Isa isa();            // the level in use
void set_isa(Isa x);  // for tests: every level gives the right result, only the speed differs

// Declares the functions of a kernel in `space` of every level, where `op` names the namespace of their parameters.
// Ranges [from, to) among those are what parallel_for hands out.
#define ACCEL_DECLARE_AT(level, op, space, ...) \
  namespace accel::level::space {               \
  using namespace accel::op;                    \
  __VA_ARGS__                                   \
  }
#if defined(__x86_64__)
#define ACCEL_DECLARE(op, space, ...)                 \
  ACCEL_DECLARE_AT(portable, op, space, __VA_ARGS__) \
  ACCEL_DECLARE_AT(avx2, op, space, __VA_ARGS__)     \
  ACCEL_DECLARE_AT(avx512, op, space, __VA_ARGS__)   \
  ACCEL_DECLARE_AT(avx512_bf16, op, space, __VA_ARGS__)
#else
#define ACCEL_DECLARE(op, space, ...) ACCEL_DECLARE_AT(portable, op, space, __VA_ARGS__)
#endif

// The function of the level in use, of those declared: ACCEL_LEVEL(space::forward)(params, ...).
#if defined(__x86_64__)
#define ACCEL_LEVEL(function)                                                   \
  (::accel::isa() == ::accel::Isa::avx512_bf16 ? ::accel::avx512_bf16::function \
   : ::accel::isa() == ::accel::Isa::avx512    ? ::accel::avx512::function      \
   : ::accel::isa() == ::accel::Isa::avx2      ? ::accel::avx2::function        \
                                               : ::accel::portable::function)
#else
#define ACCEL_LEVEL(function) (::accel::portable::function)
#endif

}  // namespace accel
