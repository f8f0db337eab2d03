#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "operators/adamw/adamw.h"

namespace oryx::operators {

void adamw_step_reference(at::TensorList parameters, at::TensorList gradients, at::TensorList first_moments,
                          at::TensorList second_moments, const AdamwOptions& options) {
  c10::NoGradGuard no_grad;
  const double step = static_cast<double>(options.step);
  const double correction1 = 1 - std::pow(options.beta1, step),
               correction2 = 1 - std::pow(options.beta2, step);
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor &p = parameters[i], &m = first_moments[i], &v = second_moments[i];
    at::Tensor g = gradients[i].defined() ? gradients[i] * options.gradient_scale : at::zeros_like(p);
    if (options.gradient_scale_tensor.defined()) g = g * options.gradient_scale_tensor.to(g.scalar_type());
    const double weight_decay = options.weight_decay.empty() ? 0 : options.weight_decay[i];
    p.mul_(1 - options.learning_rate * weight_decay);
    m.mul_(options.beta1).add_(g, 1 - options.beta1);
    v.mul_(options.beta2).addcmul_(g, g, 1 - options.beta2);
    p.sub_((m / correction1) / ((v / correction2).sqrt() + options.eps), options.learning_rate);
  }
}

double global_norm_reference(at::TensorList gradients) {
  double total = 0;
  for (const at::Tensor& g : gradients)
    if (g.defined()) total += g.to(at::kDouble).square().sum().item<double>();
  return std::sqrt(total);
}

}  // namespace oryx::operators
