// Vectors of length one: the normalisation of queries and keys in the gated delta rule.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::operators {

// y = x / sqrt(Σ x² + eps), the sum over the last dimension.
//
//   x  [..., D]   float32, float64 or bfloat16; last dimension contiguous, any strides else
// Returns y contiguous, shape and dtype of x. Sums in the accumulate type (float64 for float64, else
// float32), rounds once. Differentiable in x; backward saves one factor per vector and y, which the reader of
// y keeps as well, not x: the rounding of y shows in dx, relative to dy / |x|. Throws Error on other dtypes.
at::Tensor l2_norm(const at::Tensor& x, double eps = 1e-6);

// The same in composed ATen operations: the definition, for any device and dtype.
at::Tensor l2_norm_reference(const at::Tensor& x, double eps = 1e-6);

}  // namespace oryx::operators
