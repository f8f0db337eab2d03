// What the linear mixers make of their narrow projections: how much of a head's state each token keeps, and
// how strongly it is written.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace oryx::operators {

// With step Δ = softplus(x + bias) · mask:
//
//   log_decay = −exp(log_a) · Δ
//   strength  = Δ (Mamba-2, Dao & Gu 2024), or sigmoid(beta) · mask where beta is given (Gated DeltaNet, Yang
//               et al. 2025)
//
//   x      [batch, time, heads]     float32, float64 or bfloat16; last dimension contiguous
//   bias   [heads]                  used in the accumulate type (double for double x, else float)
//   log_a  [heads]                  likewise
//   beta   as x                     shape and dtype of x, rows as far apart as they like
//   rows   [batch, time] int64      where the inputs lie in another order: x and beta are [batch·time, heads]
//                                   then, and x[b,t] stands for row rows[b,t]; every row is named once
//   mask   [batch, time, 1]         accumulate type; a constant. At 0 a token leaves the state as it is
// Returns log_decay and strength, both [batch, time, heads] of the accumulate type, rounded nowhere in
// between. Differentiable in x, bias, log_a and beta. On a GPU one kernel forward; backward saves the inputs
// only. Throws Error on other shapes or dtypes.
std::tuple<at::Tensor, at::Tensor> decays(const at::Tensor& x, const at::Tensor& bias,
                                          const at::Tensor& log_a,
                                          const std::optional<at::Tensor>& beta = std::nullopt,
                                          const std::optional<at::Tensor>& rows = std::nullopt,
                                          const std::optional<at::Tensor>& mask = std::nullopt);

// The same in composed ATen operations: the definition, for any device and dtype.
std::tuple<at::Tensor, at::Tensor> decays_reference(const at::Tensor& x, const at::Tensor& bias,
                                                    const at::Tensor& log_a,
                                                    const std::optional<at::Tensor>& beta = std::nullopt,
                                                    const std::optional<at::Tensor>& rows = std::nullopt,
                                                    const std::optional<at::Tensor>& mask = std::nullopt);

}  // namespace oryx::operators
