#include "model/recompute.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

namespace oryx::model {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LayerHolder : torch::CustomClassHolder {
  explicit LayerHolder(LayerFunction function) : layer(std::move(function)) {}
  LayerFunction layer;
};

class Recomputed : public torch::autograd::Function<Recomputed> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& residual, const at::Tensor& normed,
                               const LayerFunction& layer) {
    context->save_for_backward({residual, normed});
    context->saved_data["layer"] = at::IValue::make_capsule(c10::make_intrusive<LayerHolder>(layer));
    const auto [sum, next] = layer(residual, normed);  // gradients are off here
    return {sum, next};
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const variable_list saved = context->get_saved_variables();
    const auto holder =
        c10::static_intrusive_pointer_cast<LayerHolder>(context->saved_data["layer"].toCapsule());
    const at::AutoGradMode enable(true);
    const at::Tensor residual = saved[0].detach().set_requires_grad(true),
                     normed = saved[1].detach().set_requires_grad(true);
    const auto [sum, next] = holder->layer(residual, normed);
    torch::autograd::backward({sum, next}, upstream);
    return {residual.grad(), normed.grad(), {}};
  }
};

}  // namespace

std::pair<at::Tensor, at::Tensor> recomputed(const LayerFunction& layer, const at::Tensor& residual,
                                             const at::Tensor& normed) {
  const variable_list out = Recomputed::apply(residual, normed, layer);
  return {out[0], out[1]};
}

}  // namespace oryx::model
