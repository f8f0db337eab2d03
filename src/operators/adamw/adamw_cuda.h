// CUDA kernels of adamw.
#pragma once

#include <ATen/core/Tensor.h>

#include "operators/adamw/adamw.h"
#include "operators/adamw/adamw_cpu.h"

namespace oryx::cuda {

// The step of all tensors, in a launch for every few dozen of them.
void adamw_update(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
                  at::TensorList second_moments, const operators::AdamwOptions& options,
                  const operators::AdamwFactors& factors);

// sqrt(Σ g²) as a float64 scalar on the device of `like`; undefined gradients are skipped.
at::Tensor global_norm(at::TensorList gradients, const at::Tensor& like);

}  // namespace oryx::cuda
