#include <ATen/ATen.h>

#include "operators/activations.h"
#include "operators/cross_entropy/cross_entropy.h"

namespace oryx::operators {

std::tuple<at::Tensor, at::Tensor> cross_entropy_reference(const at::Tensor& hidden, const at::Tensor& weight,
                                                           const at::Tensor& targets, double scale) {
  const at::Tensor logits =
      at::mm(hidden, weight.to(hidden.scalar_type()).t()).to(accumulate_type(hidden.scalar_type()));
  const at::Tensor columns = targets.clamp_min(0).unsqueeze(1);
  const at::Tensor losses = at::logsumexp(logits, {1}) - logits.gather(1, columns).squeeze(1);
  const at::Tensor counted = at::where(targets >= 0, losses, at::zeros_like(losses));
  return {counted.sum() * scale, counted.detach()};
}

}  // namespace oryx::operators
