// RMS normalisation, SiLU gating, and both in either order, in one pass over memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace oryx::operators {

// With norm(u) = u · rsqrt(mean(u²) + eps) over groups of G neighbouring channels, s = SiLU(gate):
//   order "after_gate"    y = norm(x ⊙ s) ⊙ w      gate first, then norm (Mamba-2; Oryx-TM)
//   order "before_gate"   y = norm(x) ⊙ w ⊙ s      norm first, then gate (Gated DeltaNet; Oryx-TG)
//   no gate               y = norm(x) ⊙ w           plain RMSNorm (either order)
//   no weight             y = x ⊙ s                 no norm: the SwiGLU product (x = up, gate = gate)
// One of gate and weight must be present.
//
//   x       [..., C]   float32, float64 or bfloat16; last dimension contiguous
//   gate    [..., C]   shape and dtype of x, raw: SiLU is applied here
//   weight  [G]        G divides C: G = C normalises the full width, G = head width normalises each head with
//                      the one vector shared by all; used in the accumulate type (float64 for float64 x,
//                      else float32)
// Returns y contiguous, shape and dtype of x; computed in the accumulate type, rounded once.
// Differentiable in x, gate and weight. Backward saves the inputs and, on the CPU, one factor per group. The
// weight's gradient is summed over fixed blocks of rows in order: it does not depend on the number of CPU
// threads, and repeats bit for bit on one GPU. Throws Error on other shapes, dtypes or orders.
at::Tensor gated_norm(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                      const std::optional<at::Tensor>& weight, double eps, std::string_view order);

// The gradients of gated_norm() for the gradient `dy` of its result, and the result again, for who kept only
// the inputs: on a GPU in one pass over memory. dx, dgate and y have the shape of x, dweight that of weight;
// those of absent inputs are undefined. Not differentiable.
struct GatedNormGradients {
  at::Tensor dx, dgate, dweight, y;
};
GatedNormGradients gated_norm_gradients(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                                        const std::optional<at::Tensor>& weight, double eps,
                                        std::string_view order, const at::Tensor& dy);

// sum = residual + update (rounded to the dtype), normed = norm(sum) ⊙ weight: the residual addition of a
// layer together with the next layer's RMSNorm, one pass forward and one backward.
//
//   residual, update  [..., C]  same dtype;   weight  [C]
// Returns (sum, normed). Differentiable in all three.
std::tuple<at::Tensor, at::Tensor> add_norm(const at::Tensor& residual, const at::Tensor& update,
                                            const at::Tensor& weight, double eps);

// The same in composed ATen operations: the definitions, for any device and dtype.
at::Tensor gated_norm_reference(const at::Tensor& x, const std::optional<at::Tensor>& gate,
                                const std::optional<at::Tensor>& weight, double eps, std::string_view order);
std::tuple<at::Tensor, at::Tensor> add_norm_reference(const at::Tensor& residual, const at::Tensor& update,
                                                      const at::Tensor& weight, double eps);

}  // namespace oryx::operators
