// Token ids to the rows of the embedding.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::model {

// weight [vocabulary, width] of a floating type, ids [n] int64 within the vocabulary → [n, width] in `dtype`.
// Differentiable in the weight: the gradients of a row are summed in the accumulate type of `dtype` and come
// in the weight's dtype, or in its grad_dtype() where a leaf has another.
at::Tensor embed(const at::Tensor& weight, const at::Tensor& ids, at::ScalarType dtype);

}  // namespace oryx::model
