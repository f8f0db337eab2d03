// CUDA kernels of decays on tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace oryx::cuda {

// What decays() got, checked: rows of x and beta at one distance each, bias and log_a in the accumulate type,
// everything but x and beta contiguous.
struct DecayInput {
  at::Tensor x, bias, log_a;
  std::optional<at::Tensor> beta, rows, mask;
};

// log_decay and strength.
std::tuple<at::Tensor, at::Tensor> decays_forward(const DecayInput& input);

struct DecayGradients {
  at::Tensor x, bias, log_a, beta;  // beta undefined where there was none
};
// Either upstream gradient may be undefined.
DecayGradients decays_backward(const DecayInput& input, const at::Tensor& dlog_decay,
                               const at::Tensor& dstrength);

}  // namespace oryx::cuda
