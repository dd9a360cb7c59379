// Activations by their names.
#pragma once

#include <string>

#include "check.h"
#include "params.h"

namespace accel::gau_attention {

inline Activation activation_of(const std::string& name) {
  if (name == "relu2") return Activation::relu2;
  if (name == "laplace") return Activation::laplace;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "sigmoid", "activation must be relu2, laplace, silu or sigmoid, got ", name);
  return Activation::sigmoid;
}

}  // namespace accel::gau_attention
