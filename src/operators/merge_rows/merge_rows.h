// Rows that lie in another order than the tokens.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::operators {

// y[rows[i][j]] = parts[i][j]; together the rows must name every one of the `count` rows of y exactly once.
//
//   parts  packed tensors [n_i, …], one dtype and device, equal trailing sizes
//   rows   int64 [n_i], on the device of the parts
// Returns y [count, …]. Differentiable in the parts. Throws Error when the sizes do not add up to count.
at::Tensor merge_rows(at::TensorList parts, at::TensorList rows, int64_t count);

// y[b,t] = x[rows[b,t]]: the rows of x in the order of the tokens.
//
//   x     [batch·time, channels]
//   rows  [batch, time] int64  every row once
// Returns y [batch, time, channels]. Differentiable in x, whose gradient is put in its place, not added.
at::Tensor take_rows(const at::Tensor& x, const at::Tensor& rows);

// Throws Error, as `op`, where `rows` is not what take_rows() wants for the rows of x.
void expect_token_rows(const char* op, const at::Tensor& x, const at::Tensor& rows);

// whole[rows[j]] = part[j] in place; all other rows of whole stay as they are. Has no gradients.
//
//   whole  [count, …]  contiguous
//   rows   int64 [n], on the device of whole, each at most once
//   part   [n, …]      dtype and device of whole
// Throws Error on other shapes or types.
void write_rows(at::Tensor whole, const at::Tensor& rows, const at::Tensor& part);

}  // namespace oryx::operators
