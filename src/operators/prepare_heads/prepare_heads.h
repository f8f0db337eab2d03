// Queries and keys on their way to a mixer: activation, normalisation and rotation of every head in one pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace oryx::operators {

struct HeadSteps {
  bool silu = false;                      // u = SiLU(x), else x
  bool l2_norm = false;                   // v = u / sqrt(Σ u² + eps), else u
  std::optional<at::Tensor> cosine = {};  // with sine: y = v rotated as operators/rotary says, else v
  std::optional<at::Tensor> sine = {};
  double eps = 1e-6;
};

// y = the steps that are asked for, in the order activation, l2_norm, rotary.
//
//   x             [rows, heads, D] or [batch, time, heads, D]; float32, float64 or bfloat16, last dimension
//   contiguous cosine, sine  [n, D/2]  as of rotary()
// Returns y contiguous, shape and dtype of x, or x itself where no step is asked for. Kernels of a GPU
// compute in the accumulate type and round once; on the CPU it is the composition, rounded after every step.
// Differentiable in x; backward saves x (nothing where it only rotates, y where it only normalises) and one
// factor per normalised vector. Throws Error as rotary() and l2_norm() do.
at::Tensor prepare_heads(const at::Tensor& x, const HeadSteps& steps);

// The composition of ATen's silu, l2_norm() and rotary(): the definition, for any device and dtype.
at::Tensor prepare_heads_reference(const at::Tensor& x, const HeadSteps& steps);

}  // namespace oryx::operators
