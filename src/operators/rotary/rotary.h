// Rotary position embedding (Su et al. 2021) in the half-split pairing of GPT-NeoX and Llama.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace oryx::operators {

// The angles of `positions` for heads of width `dim`: cosine and sine of
// positions[r] · base^(-2i/dim), i = 0 … dim/2-1, computed in float64 and rounded once.
//
//   positions  [n]         int64
//   dim                    even
//   dtype                  of the tables: the accumulate type of the tensors they rotate
// Returns cosine [n, dim/2] and sine [n, dim/2] on the device of `positions`.
std::tuple<at::Tensor, at::Tensor> rotary_tables(const at::Tensor& positions, int64_t dim, double base,
                                                 at::ScalarType dtype);

// Rotates the pairs (i, i + D/2) of every head:
//   y[i] = x[i]·cos − x[i+D/2]·sin,   y[i+D/2] = x[i+D/2]·cos + x[i]·sin.
//
//   x             [rows, heads, D] or [batch, time, heads, D]; float32, float64 or bfloat16, last dimension
//                 contiguous. Row r (batch and time flattened) uses table row r % n.
//   cosine, sine  [n, D/2]  accumulate type (float64 for float64 x, else float32); n divides the rows
// Returns y contiguous, shape and dtype of x; bfloat16 is rounded once. Differentiable in x (the gradient is
// rotated back); the tables are constants. Throws Error on other shapes or dtypes.
at::Tensor rotary(const at::Tensor& x, const at::Tensor& cosine, const at::Tensor& sine);

// rotary() for two readers of y, which comes twice, as two handles of one tensor. What flows back through
// both is added by the backward pass itself: on a GPU as it reads, rounded nowhere in between.
std::tuple<at::Tensor, at::Tensor> rotary_for_two(const at::Tensor& x, const at::Tensor& cosine,
                                                  const at::Tensor& sine);

// The same in composed ATen operations: the definition, for any device and dtype.
at::Tensor rotary_reference(const at::Tensor& x, const at::Tensor& cosine, const at::Tensor& sine);

}  // namespace oryx::operators
