// Layers that keep only their inputs for backward and run again there: less memory for a third more work.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <utility>

namespace oryx::model {

// The residual stream and its normed form, to the same after a layer.
using LayerFunction = std::function<std::pair<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&)>;

// layer(residual, normed), whose intermediate tensors are dropped and made again in backward. Gradients of
// the parameters that `layer` reads are added to them there, as without it; values and gradients are the same
// bit for bit where the operations are. `layer` must give the same results every time it is called.
std::pair<at::Tensor, at::Tensor> recomputed(const LayerFunction& layer, const at::Tensor& residual,
                                             const at::Tensor& normed);

}  // namespace oryx::model
