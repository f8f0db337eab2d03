#include <ATen/ATen.h>

#include "operators/activations.h"
#include "operators/short_conv/short_conv.h"

namespace oryx::operators {

std::tuple<at::Tensor, at::Tensor> short_conv_reference(const at::Tensor& x, const at::Tensor& weight,
                                                        const std::optional<at::Tensor>& bias,
                                                        const std::optional<at::Tensor>& tail,
                                                        std::string_view activation,
                                                        const std::optional<at::Tensor>& rows) {
  if (rows) {
    const at::Tensor in_order =
        x.index_select(0, rows->flatten()).view({rows->size(0), rows->size(1), x.size(1)});
    return short_conv_reference(in_order, weight, bias, tail, activation);
  }
  const int64_t time = x.size(1), width = weight.size(1);
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  const at::Tensor before = tail ? *tail : at::zeros({x.size(0), width - 1, x.size(2)}, x.options());
  const at::Tensor inputs = at::cat({before, x}, 1), wide = inputs.to(accumulate);
  at::Tensor z = at::zeros(x.sizes(), wide.options());
  if (bias) z = z + bias->to(accumulate);
  for (int64_t j = 0; j < width; ++j) z = z + wide.slice(1, j, j + time) * weight.select(1, j).to(accumulate);
  if (activation == "silu") z = at::silu(z);
  return {z.to(x.scalar_type()), inputs.slice(1, time)};
}

}  // namespace oryx::operators
