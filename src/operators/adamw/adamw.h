// AdamW (Loshchilov & Hutter 2019, as torch.optim.AdamW) over all tensors of a model in one pass over memory,
// and the global norm that gradient clipping needs.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace oryx::operators {

struct AdamwOptions {
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  std::vector<double> weight_decay = {};  // one per tensor; empty = none for all
  int64_t step = 1;                       // 1 at the first update: sets the bias corrections
  double gradient_scale = 1;              // multiplies every gradient: clipping and loss scaling
  // One more factor, float32 or float64 [] on the device of the parameters; absent = 1. A clipping factor
  // made from global_norm_device() never makes the host wait.
  at::Tensor gradient_scale_tensor = {};
};

// With g = gradient · gradient_scale · gradient_scale_tensor and t = step, elementwise and in place:
//   p ← p · (1 − learning_rate · weight_decay)
//   m ← beta1 · m + (1 − beta1) · g
//   v ← beta2 · v + (1 − beta2) · g²
//   p ← p − learning_rate · (m / (1 − beta1^t)) / (sqrt(v / (1 − beta2^t)) + eps)
// parameters[i], first_moments[i] and second_moments[i] have one shape, device and dtype (float32 or
// float64), all contiguous; gradients[i] is the same, or undefined, which counts as zero: moments and decay
// still apply. The result does not depend on the number of threads. Throws Error on mismatches and step < 1.
void adamw_step(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
                at::TensorList second_moments, const AdamwOptions& options);

// sqrt(Σ g²) over all gradients, accumulated in double over fixed blocks in order: it does not depend on the
// number of threads. Undefined gradients count as zero. Takes contiguous float32, float64 and bfloat16.
double global_norm(at::TensorList gradients);

// The same as a float64 scalar [] on the device of the gradients, which a GPU computes without the host
// waiting for it.
at::Tensor global_norm_device(at::TensorList gradients);

// The same in composed ATen operations: the definitions, for any device.
void adamw_step_reference(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
                          at::TensorList second_moments, const AdamwOptions& options);
double global_norm_reference(at::TensorList gradients);

}  // namespace oryx::operators
