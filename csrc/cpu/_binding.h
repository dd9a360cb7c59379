// What the bindings of the CPU kernels do alike: argument types, the dtype and the level a kernel runs at.
#pragma once

#include "check.h"
#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel {

// `who` begins the refusal of any other dtype: "deform_conv2d takes".
inline Dtype dtype_of(const Tensor& x, const char* who) {
  if (x.scalar_type() == ScalarType::Float) return Dtype::f32;
  if (x.scalar_type() == ScalarType::BFloat16) return Dtype::bf16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, who, " float32, bfloat16 and float16");
  return Dtype::f16;
}

}  // namespace accel
