// What every operator over activations asks of its arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <initializer_list>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace oryx::operators {

// The type that sums, norms and master copies of weights use for activations of type `dtype`.
inline at::ScalarType accumulate_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// The type in which a weight collects its gradient: its own, unless it is a leaf that asks for another one
// (as bfloat16 weights do whose float32 originals lie elsewhere).
inline at::ScalarType gradient_type(const at::Tensor& weight) {
  return weight.is_leaf() ? weight.grad_dtype().value_or(weight.scalar_type()) : weight.scalar_type();
}

// Throws Error unless the tensor is float32, float64 or bfloat16.
inline void expect_activations(std::string_view who, std::string_view name, const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  expect(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16,
         "[{}] expected {} of float32, float64 or bfloat16, got {}", who, name, at::toString(dtype));
}

// The tensor itself where its last dimension is contiguous, which is all the kernels ask for, else a copy.
inline at::Tensor contiguous_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// What flows back to a tensor of two readers, either of which may give nothing (undefined): a gradient, and
// where `adds` says that the kernel adds them itself, a second one of the same strides, else undefined.
inline std::pair<at::Tensor, at::Tensor> joined_gradients(at::Tensor first, at::Tensor second, bool adds) {
  if (!first.defined()) std::swap(first, second);
  if (!second.defined()) return {first, second};
  if (!adds) return {first.add(second), at::Tensor()};
  return {first.contiguous(), second.contiguous()};
}

// Whether autograd wants a gradient for any of the tensors; undefined ones count as constants.
inline bool needs_gradient(std::initializer_list<at::Tensor> tensors) {
  return c10::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); });
}

}  // namespace oryx::operators
