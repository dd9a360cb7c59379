// What bindings ask of the device (cuda/_runtime.h), where their kernels run on the CPU.

#include "cuda/_runtime.h"
#include "runtime.h"

extern "C" const char* accel_cuda_text(int) { return accel_host_error(); }
extern "C" int accel_cuda_processors(int) { return 1; }
extern "C" int accel_cuda_shared_memory(int) { return int(accel::host::shared_limit); }
