// What the tests of the operators share: relative errors and gradients of composed code.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <vector>

namespace oryx::operators::testing {

// ‖a − b‖ / ‖b‖ in float64; NaN if any element is, ‖a‖ if b is zero.
inline double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor want = b.to(at::kDouble), difference = a.to(at::kDouble) - want;
  const double norm = want.norm().item<double>(), error = difference.norm().item<double>();
  return norm > 0 ? error / norm : error;
}

inline at::Tensor random_normal(at::IntArrayRef sizes, at::ScalarType dtype = at::kDouble) {
  return at::randn(sizes, at::kDouble).to(dtype);
}

// Leaves of the same values that autograd follows.
inline std::vector<at::Tensor> leaves(const std::vector<at::Tensor>& tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& t : tensors) result.push_back(t.detach().to(dtype).clone().set_requires_grad(true));
  return result;
}

// d⟨outputs, cotangents⟩ / d inputs.
inline std::vector<at::Tensor> gradients(const std::vector<at::Tensor>& outputs,
                                         const std::vector<at::Tensor>& inputs,
                                         const std::vector<at::Tensor>& cotangents) {
  return torch::autograd::grad(outputs, inputs, cotangents);
}

// The scalar ⟨f(inputs), cotangents⟩ differentiated along a random direction: relative difference between
// autograd and the central difference in float64.
inline double directional_error(
    const std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>& function,
    const std::vector<at::Tensor>& at_inputs) {
  const std::vector<at::Tensor> inputs = leaves(at_inputs, at::kDouble);
  const std::vector<at::Tensor> outputs = function(inputs);
  std::vector<at::Tensor> cotangents, directions;
  for (const at::Tensor& y : outputs) cotangents.push_back(random_normal(y.sizes()));
  for (const at::Tensor& x : inputs) directions.push_back(random_normal(x.sizes()));
  const std::vector<at::Tensor> grads = gradients(outputs, inputs, cotangents);
  double analytic = 0, scale = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    analytic += (grads[i] * directions[i]).sum().item<double>();
    scale += (grads[i] * directions[i]).square().sum().item<double>();
  }
  const double step = 1e-5;
  const auto value = [&](double sign) {
    c10::NoGradGuard no_grad;
    std::vector<at::Tensor> moved;
    for (size_t i = 0; i < inputs.size(); ++i)
      moved.push_back(inputs[i].detach() + sign * step * directions[i]);
    const std::vector<at::Tensor> result = function(moved);
    double total = 0;
    for (size_t i = 0; i < result.size(); ++i) total += (result[i] * cotangents[i]).sum().item<double>();
    return total;
  };
  return std::abs((value(1) - value(-1)) / (2 * step) - analytic) / std::max(std::sqrt(scale), 1e-30);
}

}  // namespace oryx::operators::testing
