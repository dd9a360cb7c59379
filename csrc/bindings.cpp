// The Python module accel._C: build facts and the CPU level in use. The ops register themselves with torch when the
// library is loaded (accel_native namespace), each in the binding file of its own folder.

#include <atomic>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/_isa.h"
#ifdef ACCEL_CUDA_ARCHS
#include "cuda/_runtime.h"
#endif

namespace accel {

Isa highest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
              __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512cd");
  // what has the first has the second as well, but for one generation of servers (Cooper Lake)
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

// The bf16 dot product pays where it is issued as often as an fp32 multiply-add, twice the products: on Zen 4, 113 against
// 57 G multiply-adds/s a core. On Sapphire Rapids it is half the rate of converting to fp32 first, 43 against 88.
Isa best_isa() {
  Isa best = highest_isa();
#if defined(__x86_64__)
  if (best == Isa::avx512_bf16 && !__builtin_cpu_is("amd")) best = Isa::avx512;
#endif
  return best;
}

static std::atomic<int> level{int(best_isa())};

Isa isa() { return Isa(level.load(std::memory_order_relaxed)); }
void set_isa(Isa x) { level.store(int(x), std::memory_order_relaxed); }

}  // namespace accel

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of accel: importing this registers torch.ops.accel_native.";
  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = std::string("clang ") + __clang_version__;
#else
    info["compiler"] = std::string("g++ ") + __VERSION__;
#endif
    std::vector<std::string> built;
#if defined(__x86_64__)
    int levels = 4;
#else
    int levels = 1;
#endif
    for (int i = 0; i < levels; ++i) built.emplace_back(accel::ISA_NAMES[i]);
    info["isa_built"] = built;
    info["isa_highest"] = accel::ISA_NAMES[int(accel::highest_isa())];
    info["isa"] = accel::ISA_NAMES[int(accel::isa())];
    info["torch_built"] = ACCEL_TORCH_VERSION;
#ifdef ACCEL_CUDA_ARCHS
    info["cuda_archs"] = ACCEL_CUDA_ARCHS;
#else
    info["cuda_archs"] = "";
    info["cuda_missing"] = ACCEL_CUDA_MISSING;
#endif
    return info;
  }, "Compiler, instruction-set levels (built, highest here, in use), torch built against, CUDA architectures.");
#ifdef ACCEL_CUDA_ARCHS
  m.def("cuda_error", [](int device) -> std::string {
    int error = accel_cuda_probe(device);
    return error ? accel_cuda_text(error) : "";
  }, py::arg("device"), "Why the CUDA kernels cannot run on a device, in the driver's words; empty if they can.");
#endif
  m.def("set_isa", [](const std::string& name) {
    for (int i = 0; i <= int(accel::highest_isa()); ++i)
      if (name == accel::ISA_NAMES[i]) return accel::set_isa(accel::Isa(i));
    throw py::value_error("instruction-set level '" + name + "' is not one this processor has; the highest is '" +
                          accel::ISA_NAMES[int(accel::highest_isa())] + "'");
  }, py::arg("name"), "Run the CPU kernels at another level, to test or compare it; process-wide.");
}
