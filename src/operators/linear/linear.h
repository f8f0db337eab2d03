// Matrix products with weights: y = x Wᵀ, alone or several from one input.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace oryx::operators {

// y = x Wᵀ.
//
//   x      [N, in]     float32, float64 or bfloat16
//   weight [out, in]   dtype of x; or float32 with a bfloat16 x: the weight is a master copy, rounded to
//   bfloat16
//                      for the product (and again in backward: nothing is kept), its gradient is float32.
//                      A leaf whose grad_dtype() is float32 gets a float32 gradient too: the same bits as the
//                      master copy that it is the rounding of
// Returns [N, out], dtype of x. Sums are in the accumulate type (float64 for float64, else float32).
// Differentiable in x and weight; saves them, nothing else.
//
// Up to 16 rows (decoding) run in a kernel of our own that reads the weight once at memory speed; there a
// row's result is bitwise the same for any number of rows, threads and any companions in projections(). More
// rows run in the matrix product of LibTorch. Throws Error on other shapes or dtypes.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight);

// The gradients of linear() in x and in weight for the gradient `upstream` [N, out] of its result. The first
// takes nothing but shape and dtype from x.
at::Tensor linear_input_gradient(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& upstream);
at::Tensor linear_weight_gradient(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& upstream);

// Neighbouring rows of a matrix.
struct RowRange {
  int64_t first = 0, count = 0;
};

// y_i = x[rows_i] W_iᵀ for several weights over one input, as one node of the autograd graph: backward sums
// the gradient of x over all of them in one buffer (for bfloat16 in float32, rounded once; on a GPU rounded
// at each of the sums).
//
//   weights  [out_i, in] each, as in linear()
//   rows     one per weight: the rows of x that it reads, of which there may be none
// Returns y_i [rows_i.count, out_i]; on a GPU those of less than 64 outputs are columns of one wider matrix.
std::vector<at::Tensor> projections(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                    const std::vector<RowRange>& rows);

// The same in composed ATen operations: the definitions, for any device and dtype.
at::Tensor linear_reference(const at::Tensor& x, const at::Tensor& weight);
std::vector<at::Tensor> projections_reference(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                              const std::vector<RowRange>& rows);

}  // namespace oryx::operators
