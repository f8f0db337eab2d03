// CUDA kernels of merge_rows.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::cuda {

// whole[rows[i][j]] = parts[i][j], or with `scatter` false parts[i][j] = whole[rows[i][j]]. Everything
// contiguous; the elements have at least two bytes.
void merge_rows(at::TensorList parts, at::TensorList rows, const at::Tensor& whole, bool scatter);

}  // namespace oryx::cuda
