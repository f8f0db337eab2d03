// Depthwise causal convolution along time with an optional SiLU, and the raw inputs a later piece needs.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace oryx::operators {

// y[b,t,c] = act( Σ_j weight[c,j] · x[b, t-(W-1)+j, c] + bias[c] )        j = 0 … W-1
// Column W-1 multiplies the current token. Inputs before the piece come from `tail`.
//
//   x       [batch, time, channels]  float32, float64 or bfloat16; last dimension contiguous
//   weight  [channels, W]            W >= 1; used in the accumulate type (double for double x, else float)
//   bias    [channels]               as weight
//   tail    [batch, W-1, channels]   dtype of x: the raw inputs just before this piece; absent = zeros
//   activation                       "none" or "silu"
//   rows    [batch, time] int64      where the inputs lie in another order: x is [batch·time, channels], and
//                                    x[b,t] above stands for its row rows[b,t]; every row is named once
// Returns y [batch, time, channels] and the new tail [batch, W-1, channels], both in the dtype of x. The new
// tail is the last W-1 rows of (tail, x), so a sequence cut into pieces gives the values of the whole,
// bit for bit. time may be 0.
// Differentiable in x, weight, bias and tail; gradients flow in through both outputs. Backward saves only the
// inputs and recomputes the pre-activations.
// Throws Error on other shapes, dtypes or activations.
std::tuple<at::Tensor, at::Tensor> short_conv(const at::Tensor& x, const at::Tensor& weight,
                                              const std::optional<at::Tensor>& bias,
                                              const std::optional<at::Tensor>& tail,
                                              std::string_view activation,
                                              const std::optional<at::Tensor>& rows = std::nullopt);

// short_conv() for two readers of y, which comes twice, as two handles of one tensor, then the new tail. What
// flows back through both handles is added by the backward pass itself: on a GPU as it reads, rounded nowhere
// in between.
std::tuple<at::Tensor, at::Tensor, at::Tensor> short_conv_for_two(const at::Tensor& x,
                                                                  const at::Tensor& weight,
                                                                  const std::optional<at::Tensor>& bias,
                                                                  const std::optional<at::Tensor>& tail,
                                                                  std::string_view activation,
                                                                  const std::optional<at::Tensor>& rows);

// The same in composed ATen operations: the definition, for any device and dtype.
std::tuple<at::Tensor, at::Tensor> short_conv_reference(const at::Tensor& x, const at::Tensor& weight,
                                                        const std::optional<at::Tensor>& bias,
                                                        const std::optional<at::Tensor>& tail,
                                                        std::string_view activation,
                                                        const std::optional<at::Tensor>& rows = std::nullopt);

}  // namespace oryx::operators
