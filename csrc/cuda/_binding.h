// What the bindings of the CUDA kernels do alike: checks, device and stream, scratch memory.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>

#include "check.h"
#include "cuda/_runtime.h"

#ifndef ACCEL_HOST_CUDA
// Only a CUDA build of torch has it. Weak, so that the same binary loads on a CPU build, where nothing calls it.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace accel {

constexpr int64_t scratch_at_once = int64_t{256} << 20;  // bytes, if that is enough for one image

inline void check_launch(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, what, ": CUDA error ", error, ", ", accel_cuda_text(error));
}

#ifdef ACCEL_HOST_CUDA  // a test's build, over kernels that run on the CPU
#define ACCEL_KERNELS_ARE_ON CPU
inline bool where_kernels_run(const Tensor& x) { return x.is_cpu(); }
class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
#define ACCEL_KERNELS_ARE_ON CUDA
inline bool where_kernels_run(const Tensor& x) { return x.is_cuda(); }

// The device of a tensor and its current stream, for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(index_of(x)) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this build of torch has no CUDA");
    // the runtime that is linked here is not torch's
    check_launch(accel_cuda_set_device(x.get_device_index()), "cudaSetDevice");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  static int32_t index_of(const Tensor& x) {
    STD_TORCH_CHECK(where_kernels_run(x), "the first tensor must be on a GPU as the others");
    return x.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

inline void check_cuda(const Tensor& x, const char* name, const Tensor& main) {
  STD_TORCH_CHECK(where_kernels_run(x) && x.is_contiguous() && x.get_device_index() == main.get_device_index(), name,
                  " must be a contiguous tensor on the GPU of the first one");
}

inline void check_cuda(const Tensor& x, const char* name, const Tensor& main, ScalarType dtype, int64_t numel) {
  check_cuda(x, name, main);
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(x.numel() == numel, name, " must have ", numel, " elements, has ", x.numel());
}

inline int32_t dtype_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return 0;
  if (x.scalar_type() == ScalarType::BFloat16) return 1;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "the kernels take float32, bfloat16 and float16");
  return 2;
}

inline int32_t int32_of(int64_t x, const char* name) {
  STD_TORCH_CHECK(x >= 0 && x <= std::numeric_limits<int32_t>::max(), name, " must be 0 to 2^31 - 1, is ", x);
  return int32_t(x);
}

// Pairs of floats are read at once: a view may begin in the middle of one.
inline Tensor aligned_pairs(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 8 ? torch::stable::clone(x) : x;
}

inline const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

inline Tensor like(const Tensor& x, bool needed) {
  return needed ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
}

// For as many of `images` at once as the bound allows, at least one; `each` is what the launcher asks for one.
inline Tensor scratch_for(const Tensor& main, int64_t each, int64_t images) {
  STD_TORCH_CHECK(each >= 0, "the kernels do not take these sizes");
  const int64_t room = scratch_at_once / std::max<int64_t>(each, 1);
  const int64_t at_once = std::clamp<int64_t>(room, 1, std::max<int64_t>(images, 1));
  return torch::stable::new_empty(main, {each * at_once}, ScalarType::Byte);
}

}  // namespace accel
