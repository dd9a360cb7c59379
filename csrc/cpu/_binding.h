// What the bindings of the CPU kernels do alike: argument types, the dtype and the level a kernel runs at.
#pragma once

#include <algorithm>
#include <vector>

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

// The starts of packed sequences and the end of the last.
inline std::vector<int64_t> offsets_of(const OptionalTensor& cu, int64_t total, const char* name) {
  STD_TORCH_CHECK(cu->scalar_type() == ScalarType::Int && cu->numel() > 1, name, " must be int32, two or more");
  check_cpu(*cu, name);
  const int32_t* at = static_cast<const int32_t*>(cu->const_data_ptr());
  std::vector<int64_t> out(at, at + cu->numel());
  STD_TORCH_CHECK(out.front() == 0 && out.back() == total && std::is_sorted(out.begin(), out.end()), name,
                  " must rise from 0 to ", total);
  return out;
}

}  // namespace accel
