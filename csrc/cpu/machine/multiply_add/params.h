// The loops that the benchmark holds kernels against: multiply-adds of registers, with no memory in the way.
#pragma once

#include <cstdint>

// One set per instruction-set level. Each returns how many FLOPs it did, and leaves a number that depends on all.
#define ACCEL_MULTIPLY_ADD_LEVEL                          \
  int64_t multiply_add_f32(int64_t rounds, float* left);  \
  int64_t multiply_add_bf16(int64_t rounds, float* left);

namespace accel::portable {
ACCEL_MULTIPLY_ADD_LEVEL
}
#if defined(__x86_64__)
namespace accel::avx2 {
ACCEL_MULTIPLY_ADD_LEVEL
}
namespace accel::avx512 {
ACCEL_MULTIPLY_ADD_LEVEL
}
namespace accel::avx512_bf16 {
ACCEL_MULTIPLY_ADD_LEVEL
}
#endif
