// Which instruction-set level the CPU kernels run at; decided once at load time from what the processor has.
#pragma once

namespace accel {

// There is no level for AVX-512's bf16 dot product: on Sapphire Rapids one is issued every second cycle against two fp32
// multiply-adds a cycle, half the rate of converting to fp32 first (measured: 43 against 88 G multiply-adds/s a core).
enum class Isa : int { portable, avx2, avx512 };

constexpr const char* ISA_NAMES[] = {"portable", "avx2", "avx512"};

Isa best_isa();       // the highest level this processor has, of those built
Isa isa();            // the level in use
void set_isa(Isa x);  // for tests: every level gives the right result, only the speed differs

// The function of the level in use, from the namespaces a kernel header declares: ACCEL_LEVEL(forward)(params, ...).
#if defined(__x86_64__)
#define ACCEL_LEVEL(function)                                         \
  (::accel::isa() == ::accel::Isa::avx512 ? ::accel::avx512::function \
   : ::accel::isa() == ::accel::Isa::avx2 ? ::accel::avx2::function   \
                                          : ::accel::portable::function)
#else
#define ACCEL_LEVEL(function) (::accel::portable::function)
#endif

}  // namespace accel
