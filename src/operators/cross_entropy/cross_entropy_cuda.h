// CUDA kernels of cross_entropy behind the interface of the CPU kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "operators/cross_entropy/cross_entropy_cpu.h"

namespace oryx::cuda {

// As cpu::softmax_loss, on the device of `logits`; a target past the columns gives NaN.
void softmax_loss(const operators::SoftmaxLoss& arguments, const at::Tensor& logits);

// gradient *= upstream (0-dim, accumulate type of the gradient) without waiting for the device, at no cost
// where the upstream gradient is one.
void multiply_gradient(const at::Tensor& gradient, const at::Tensor& upstream);

}  // namespace oryx::cuda
