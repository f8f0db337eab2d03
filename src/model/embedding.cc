#include "model/embedding.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "operators/activations.h"

namespace oryx::model {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class Embed : public torch::autograd::Function<Embed> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight, const at::Tensor& ids,
                            at::ScalarType dtype) {
    context->save_for_backward({ids});
    context->saved_data["vocabulary"] = weight.size(0);
    context->saved_data["gradient_type"] = static_cast<int64_t>(operators::gradient_type(weight));
    return at::embedding(weight, ids).to(dtype);
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    const at::Tensor gradient = upstream[0].to(operators::accumulate_type(upstream[0].scalar_type()));
    const at::Tensor sums =
        at::embedding_dense_backward(gradient, context->get_saved_variables()[0],
                                     context->saved_data["vocabulary"].toInt(), /*padding_idx=*/-1,
                                     /*scale_grad_by_freq=*/false);
    return {sums.to(static_cast<at::ScalarType>(context->saved_data["gradient_type"].toInt())), {}, {}};
  }
};

}  // namespace

at::Tensor embed(const at::Tensor& weight, const at::Tensor& ids, at::ScalarType dtype) {
  return operators::needs_gradient({weight}) ? Embed::apply(weight, ids, dtype)
                                             : at::embedding(weight, ids).to(dtype);
}

}  // namespace oryx::model
