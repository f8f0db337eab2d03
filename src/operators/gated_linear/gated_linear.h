// A gated or normalised input through a weight: what ends both halves of a layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace oryx::operators {

// y = gated_norm(x, gate, norm_weight, eps, order) Wᵀ, with the arguments of gated_norm() and linear().
//
//   x, gate      [N, in]    norm_weight [G]    weight [out, in]
// Returns [N, out]. The same values and gradients as the two operators one after the other. On a GPU nothing
// but the arguments is kept for backward: the product's input is made again by the pass over memory that
// makes the gradients of x and gate, which saves in elements a row.
at::Tensor gated_linear(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                        const std::optional<at::Tensor>& norm_weight, double eps, std::string_view order,
                        const at::Tensor& weight);

}  // namespace oryx::operators
