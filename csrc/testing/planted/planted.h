// Small kernels, each wrong in one way when `bug` is set and right otherwise. tests/test_cuda_shim.py says which mode
// must find which, and what the right result is.
#pragma once

#include "launch.cuh"

struct Planted {
  const int* in;
  int* out;
  int n;
  int bug;
};
