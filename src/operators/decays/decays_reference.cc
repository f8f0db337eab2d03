#include <ATen/ATen.h>

#include "operators/activations.h"
#include "operators/decays/decays.h"

namespace oryx::operators {

std::tuple<at::Tensor, at::Tensor> decays_reference(const at::Tensor& x, const at::Tensor& bias,
                                                    const at::Tensor& log_a,
                                                    const std::optional<at::Tensor>& beta,
                                                    const std::optional<at::Tensor>& rows,
                                                    const std::optional<at::Tensor>& mask) {
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  const auto in_order = [&](const at::Tensor& packed) {
    if (!rows) return packed.to(accumulate);
    return packed.index_select(0, rows->flatten())
        .view({rows->size(0), rows->size(1), packed.size(1)})
        .to(accumulate);
  };
  const auto masked = [&](const at::Tensor& y) { return mask ? y * *mask : y; };
  const at::Tensor step = masked(at::softplus(in_order(x) + bias.to(accumulate)));
  const at::Tensor log_decay = step * -log_a.to(accumulate).exp();
  return {log_decay, beta ? masked(at::sigmoid(in_order(*beta))) : step};
}

}  // namespace oryx::operators
