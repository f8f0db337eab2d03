// The gated delta rule (the mixer of Gated DeltaNet): a linear recurrence whose state forgets and corrects.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace oryx::operators {

// For every sequence and state head, over all its tokens t (Yang, Kautz & Hatamizadeh, arXiv 2412.06464):
//   S_t = e^{log_decay_t} (I − beta_t k_tᵀ k_t) S_{t−1} + beta_t k_tᵀ v_t      S is [Dk, Dv], k and v are
//   rows o_t = scale · q_t S_t                                      only for the tokens of the spans
//
//   query         [N, Hq, Dk]      packed rows of the spans, in their order
//   key           [B, T, Hk, Dk]   Hk divides Hv: state head h reads key head h / (Hv / Hk)
//   value         [B, T, Hv, Dv]   one state per value head
//   log_decay     [B, T, Hv]       accumulate type (float64 for float64, else float32); meant to be ≤ 0
//   beta          [B, T, Hv]       accumulate type; the state stays bounded for 0 ≤ beta ‖k‖² ≤ 2
//   spans         [n, 3] int64 CPU rows (sequence, begin, end); N = Σ (end − begin)
//   initial_state [B, Hv, Dk, Dv]  accumulate type; none is 0
//   chunk         tokens handled at once (1 to 1024): changes speed and rounding, not the meaning
// Hq is a multiple of Hv or divides it; Ho = max(Hq, Hv); output head o reads state head o / (Ho / Hv) and
// query head o / (Ho / Hq). query, key and value share a type (float32, float64 or bfloat16) and may be
// strided in every dimension but the last. Nothing is normalised here: callers normalise query and key.
// Returns the output [N, Ho, Dv] in the type of value, and the state after the last token [B, Hv, Dk, Dv].
//
// Every token updates the state; the cost of outputs follows N. Differentiable in every floating argument
// (once). Saves for backward its inputs and one [chunk, chunk] matrix per chunk and state head; on a GPU, of
// long sequences in few streams also two states for each of the segments that fill it.
// Deterministic. Throws Error on other shapes, types or spans.
// On a GPU, kernels serve bfloat16 with head dimensions of 64 and 128, in chunks of 64 whatever `chunk` says,
// where no token has two rows; and float32 too where fewer than 16 tokens need no gradient. Their matrices of
// 64 × 64 are bfloat16. Other tensors take gated_delta_rule_chunked.
std::tuple<at::Tensor, at::Tensor> gated_delta_rule(const at::Tensor& query, const at::Tensor& key,
                                                    const at::Tensor& value, const at::Tensor& log_decay,
                                                    const at::Tensor& beta, const at::Tensor& spans,
                                                    const std::optional<at::Tensor>& initial_state,
                                                    double scale, int64_t chunk = 64);

// The same without gradients, for a piece of sequences that are read on from states among others and, it may
// be, no further: `initial_rows` and `keeps_state` as in ssd_inference() (operators/ssd/ssd.h).
std::tuple<at::Tensor, at::Tensor> gated_delta_rule_inference(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& log_decay,
    const at::Tensor& beta, const at::Tensor& spans, const std::optional<at::Tensor>& initial_state,
    const std::optional<at::Tensor>& initial_rows, double scale, bool keeps_state);

// The same in chunks, in composed ATen operations for any device (differentiable as often as they are):
// nothing is done token by token, and only the state goes from chunk to chunk. float64 of it judges kernels
// on a GPU.
std::tuple<at::Tensor, at::Tensor> gated_delta_rule_chunked(const at::Tensor& query, const at::Tensor& key,
                                                            const at::Tensor& value,
                                                            const at::Tensor& log_decay,
                                                            const at::Tensor& beta, const at::Tensor& spans,
                                                            const std::optional<at::Tensor>& initial_state,
                                                            double scale, int64_t chunk = 64);

// The same, token by token in composed ATen operations: the definition, for any device. `chunk` is only
// checked.
std::tuple<at::Tensor, at::Tensor> gated_delta_rule_recurrence(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& log_decay,
    const at::Tensor& beta, const at::Tensor& spans, const std::optional<at::Tensor>& initial_state,
    double scale, int64_t chunk = 64);

}  // namespace oryx::operators
