#include "operators/gated_linear/gated_linear.h"

#include <ATen/ATen.h>
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
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[3];
    const GatedNormGradients inner = gated_norm_gradients(
        x, present(saved[1]), present(saved[2]), context->saved_data["eps"].toDouble(),
        context->saved_data["order"].toStringRef(), linear_input_gradient(x, weight, upstream[0]));
    return {inner.dx, inner.dgate, inner.dweight,
            {},       {},          linear_weight_gradient(inner.y, weight, upstream[0])};
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
