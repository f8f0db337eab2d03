// The language-model head fused with its loss: never holds the logits of all rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace oryx::operators {

// loss = scale · Σ_r loss_r over rows with target >= 0,
// loss_r = logsumexp_v(hidden_r · weight_v) − hidden_r · weight_{target_r}.
//
//   hidden   [N, d]   float32, float64 or bfloat16
//   weight   [V, d]   dtype of hidden; with bfloat16 hidden also float32 (the master copy, rounded here)
//   targets  [N]      int64 on the device of hidden; negative = ignored (loss 0, gradient 0)
//   scale             of the loss, e.g. 1 / number of tokens in the global batch
//   rows_per_block    rows whose logits are held at once; 0 chooses at most about 64 MB of logits on the CPU
//   and
//                     512 MB on a GPU
// Returns (loss, token_losses): the scalar loss and the unscaled loss_r [N], 0 where ignored, both in the
// accumulate type (float64 for float64, else float32). Only the loss is differentiable, in hidden and weight.
// When a gradient is needed it is made in the forward pass, block by block: three matrix products, no
// recomputation; backward only multiplies by the upstream gradient and hands the tensors over (a second
// backward pass needs retain_graph, else Error). The weight's gradient is summed over blocks in the
// accumulate type and returned in the weight's dtype, or in its grad_dtype() where a leaf has another. With
// no gradient needed only losses are computed. Throws Error on other shapes or dtypes and on a target >= V;
// on a GPU, which would have to be waited for, such a target makes the loss and the gradients NaN.
std::tuple<at::Tensor, at::Tensor> cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                                 const at::Tensor& targets, double scale,
                                                 int64_t rows_per_block = 0);

// The same in composed ATen operations, holding all logits: the definition, for any device and dtype.
std::tuple<at::Tensor, at::Tensor> cross_entropy_reference(const at::Tensor& hidden, const at::Tensor& weight,
                                                           const at::Tensor& targets, double scale);

}  // namespace oryx::operators
