// CUDA kernels of gated_norm behind the interface of the CPU kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "operators/gated_norm/gated_norm_cpu.h"

namespace oryx::cuda {

// As the functions of namespace cpu, on the device of `x`. backward() makes `rstd` again and allocates its
// own partial sums: `rstd`, `partials` and `rows_per_block` are not used. It also writes the result of
// forward to `y` [rows, channels], unless that is null.
void gated_norm_forward(const operators::NormForward& arguments, const at::Tensor& x);
void gated_norm_backward(const operators::NormBackward& arguments, const at::Tensor& x, void* y);

}  // namespace oryx::cuda
