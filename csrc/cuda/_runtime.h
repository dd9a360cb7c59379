// What host code asks of the CUDA runtime, so that none but _runtime.cu needs CUDA's headers. 0 or a cudaError_t.
#pragma once

extern "C" {
int accel_cuda_set_device(int device);
// Whether this build has a kernel that the device can run, which its driver alone knows; leaves the device set.
int accel_cuda_probe(int device);
const char* accel_cuda_text(int error);
int accel_cuda_processors(int device);     // multiprocessors; 1 if it cannot be asked
int accel_cuda_shared_memory(int device);  // bytes a block may have, no less than every device gives
}
