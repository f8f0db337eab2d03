#include "operators/gated_linear/gated_linear.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/error.h"
#include "operators/activations.h"
#include "operators/device/runtime.h"
#include "operators/gated_norm/gated_norm.h"
#include "operators/linear/linear.h"

namespace oryx::operators {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<at::Tensor>;

Optional present(const at::Tensor& tensor) { return tensor.defined() ? Optional(tensor) : std::nullopt; }

class GatedLinear : public torch::autograd::Function<GatedLinear> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const Optional& gate,
                            const Optional& norm_weight, double eps, const std::string& order,
                            const at::Tensor& weight) {
    context->save_for_backward({x, gate.value_or(at::Tensor()), norm_weight.value_or(at::Tensor()), weight});
    context->saved_data["eps"] = eps;
    context->saved_data["order"] = order;
    return operators::linear(gated_norm(x, gate, norm_weight, eps, order), weight);
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    variable_list inputs = context->get_saved_variables();
    const at::Tensor weight = inputs.back();
    inputs.pop_back();
    at::Tensor inner;
    {
      const at::AutoGradMode enable(true);
      for (at::Tensor& input : inputs) {
        if (input.defined()) input = input.detach().set_requires_grad(true);
      }
      inner = gated_norm(inputs[0], present(inputs[1]), present(inputs[2]),
                         context->saved_data["eps"].toDouble(), context->saved_data["order"].toStringRef());
    }
    const auto [d_inner, d_weight] = linear_gradients(inner.detach(), weight, upstream[0]);
    variable_list leaves;
    for (const at::Tensor& input : inputs) {
      if (input.defined()) leaves.push_back(input);
    }
    const variable_list found = torch::autograd::grad({inner}, leaves, {d_inner});
    variable_list gradients(6);  // of x, gate, norm_weight; eps and order have none; of weight
    size_t next = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].defined()) gradients[i] = found[next++];
    }
    gradients[5] = d_weight;
    return gradients;
  }
};

}  // namespace

at::Tensor gated_linear(const at::Tensor& x, const Optional& gate, const Optional& norm_weight, double eps,
                        std::string_view order, const at::Tensor& weight) {
  const bool keeps_little = cuda::serves(x) && needs_gradient({x, weight});
  if (!keeps_little) return operators::linear(gated_norm(x, gate, norm_weight, eps, order), weight);
  return GatedLinear::apply(x, gate, norm_weight, eps, std::string(order), weight);
}

}  // namespace oryx::operators
