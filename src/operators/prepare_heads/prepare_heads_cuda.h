// CUDA kernels of prepare_heads, which serve l2_norm and rotary as well.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::cuda {

// Steps as tensors: undefined cosine and sine do not rotate.
struct HeadCall {
  bool silu = false, l2 = false;
  at::Tensor cosine = {}, sine = {};  // [n, D/2] contiguous, accumulate type
  double eps = 0;
  bool backwards = false;  // forward only: rotates by the negative angle
};

// y of x [batch, time, heads, D] with contiguous last dimension; writes the factors of the norm to `scale`
// [batch, time, heads] where it is defined. A call that only rotates may have a second x to add to the first:
// `again`, of its shape and strides, or undefined.
at::Tensor prepare_heads_forward(const at::Tensor& x, const HeadCall& call, const at::Tensor& scale,
                                 const at::Tensor& again = {});
// dx from dy, contiguous. `x` as in HeadTensors: y where the call only normalises.
at::Tensor prepare_heads_backward(const at::Tensor& x, const HeadCall& call, const at::Tensor& scale,
                                  const at::Tensor& dy);

}  // namespace oryx::cuda
