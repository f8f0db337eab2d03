#include <ATen/ATen.h>

#include "operators/activations.h"
#include "operators/gated_norm/gated_norm.h"

namespace oryx::operators {

namespace {
// RMSNorm over groups of weight.size(0) channels, times the weight.
at::Tensor norm(const at::Tensor& u, const at::Tensor& weight, double eps) {
  const at::Tensor grouped = u.unflatten(-1, {-1, weight.size(0)});
  const at::Tensor rstd = (grouped.square().mean(-1, /*keepdim=*/true) + eps).rsqrt();
  return (grouped * rstd * weight.to(u.scalar_type())).flatten(-2);
}
}  // namespace

at::Tensor gated_norm_reference(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                                const std::optional<at::Tensor>& weight, double eps, std::string_view order) {
  const at::ScalarType accumulate = accumulate_type(x.scalar_type());
  at::Tensor y = x.to(accumulate);
  const at::Tensor s = gate ? at::silu(gate->to(accumulate)) : at::Tensor();
  if (gate && (!weight || order == "after_gate")) y = y * s;
  if (weight) y = norm(y, *weight, eps);
  if (gate && weight && order == "before_gate") y = y * s;
  return y.to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> add_norm_reference(const at::Tensor& residual, const at::Tensor& update,
                                                      const at::Tensor& weight, double eps) {
  const at::Tensor sum = residual + update;
  return {sum, gated_norm_reference(sum, std::nullopt, weight, eps, "before_gate")};
}

}  // namespace oryx::operators
