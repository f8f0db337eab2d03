// CUDA kernels of short_conv behind the interface of the CPU kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "operators/short_conv/short_conv_cpu.h"

namespace oryx::cuda {

// As the functions of namespace cpu, on the device of `x`.
void short_conv_forward(const operators::ShortConvForward& arguments, const at::Tensor& x);
void short_conv_backward(const operators::ShortConvBackward& arguments, const at::Tensor& x);

}  // namespace oryx::cuda
