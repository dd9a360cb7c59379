// The dtypes that kernels compute, as a binding tells them: no torch type reaches a kernel.
#pragma once

namespace accel {

enum class Dtype : int { f32, bf16, f16 };

}  // namespace accel
