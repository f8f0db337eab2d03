// State space duality (the mixer of Mamba-2): a linear recurrence with a scalar decay per head.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace oryx::operators {

// For every sequence and state head, over all its tokens t (Dao & Gu, arXiv 2405.21060):
//   S_t = e^{log_decay_t} S_{t−1} + step_t k_tᵀ v_t          S is [Dk, Dv], k and v are rows
//   o_t = q_t S_t + skip v_t                                 only for the tokens of the spans
//
//   query         [N, Hq, Dk]      packed rows of the spans, in their order
//   key           [B, T, Hk, Dk]   Hk divides Hv: state head h reads key head h / (Hv / Hk)
//   value         [B, T, Hv, Dv]   one state per value head
//   log_decay     [B, T, Hv]       accumulate type (float64 for float64, else float32); meant to be ≤ 0
//   step          [B, T, Hv]       accumulate type
//   skip          [Ho]             any floating type; none is 0
//   spans         [n, 3] int64 CPU rows (sequence, begin, end); N = Σ (end − begin)
//   initial_state [B, Hv, Dk, Dv]  accumulate type; none is 0
//   chunk         tokens handled at once (1 to 1024): changes speed and rounding, not the meaning; the CUDA
//                 kernels take chunks of their own
// Hq is a multiple of Hv or divides it; Ho = max(Hq, Hv); output head o reads state head o / (Ho / Hv) and
// query head o / (Ho / Hq). query, key and value share a type (float32, float64 or bfloat16) and may be
// strided in every dimension but the last.
// Returns the output [N, Ho, Dv] in the type of value, and the state after the last token [B, Hv, Dk, Dv].
//
// Every token updates the state; the cost of outputs follows N. Differentiable in every floating argument
// (once; where composed, as often as ATen). Saves only its inputs for backward. Deterministic. Throws Error
// on other shapes, types or spans.
//
// CUDA tensors: kernels for bfloat16 with Dk and Dv of 64 or 128 and no token in two spans (scratch of
// backward is a bfloat16 copy of the state before every chunk and of its gradient); without gradients, up to
// 15 tokens go token by token, in float32 too. Everything else is ssd_chunked.
std::tuple<at::Tensor, at::Tensor> ssd(const at::Tensor& query, const at::Tensor& key,
                                       const at::Tensor& value, const at::Tensor& log_decay,
                                       const at::Tensor& step, const std::optional<at::Tensor>& skip,
                                       const at::Tensor& spans,
                                       const std::optional<at::Tensor>& initial_state, int64_t chunk = 64);

// The same without gradients, for a piece of sequences that are read on from states among others and, it may
// be, no further:
//   initial_rows  [B] int64  sequence b starts from initial_state[initial_rows[b]], initial_state being
//                            [n, Hv, Dk, Dv]: kernels read it there; none is b
//   keeps_state   false: the state after the last token is not wanted, and undefined where that saves work
std::tuple<at::Tensor, at::Tensor> ssd_inference(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& log_decay,
    const at::Tensor& step, const std::optional<at::Tensor>& skip, const at::Tensor& spans,
    const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& initial_rows,
    bool keeps_state);

// The same, token by token in composed ATen operations: the definition, for any device. `chunk` is only
// checked.
std::tuple<at::Tensor, at::Tensor> ssd_recurrence(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& log_decay,
    const at::Tensor& step, const std::optional<at::Tensor>& skip, const at::Tensor& spans,
    const std::optional<at::Tensor>& initial_state, int64_t chunk = 64);

// The same in chunks of composed, batched ATen operations, differentiable by autograd, for any device: what
// ssd() is for tensors that no kernel serves. Loops over chunks, not over tokens; keeps the state before
// every chunk.
std::tuple<at::Tensor, at::Tensor> ssd_chunked(const at::Tensor& query, const at::Tensor& key,
                                               const at::Tensor& value, const at::Tensor& log_decay,
                                               const at::Tensor& step, const std::optional<at::Tensor>& skip,
                                               const at::Tensor& spans,
                                               const std::optional<at::Tensor>& initial_state,
                                               int64_t chunk = 64);

}  // namespace oryx::operators
