// Causal attention of a part of the queries as a few large calls of a library: training on long sequences.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace oryx::operators {

// The keys of a sequence are cut into 2^n blocks. The queries of a block attend to its own keys causally, all
// blocks in one call; then, for n = 1, 2, …, the queries of the right half of every run of 2^n blocks attend
// to all keys of its left half, gathered and padded to the largest count, in one call each. A query's pieces
// combine by their log-sum-exps, and the backward pass of a piece, given the combined output and log-sum-exp,
// makes its exact share of the gradients. With p of the queries and blocks of 1/b of the sequence the cost is
// about 1/b + p (1 − 1/b) of dense attention.

// Whether the spans allow it: no token twice, all within [0, time), and `time` tokens that split into blocks.
bool fits_staircase(const at::Tensor& spans, int64_t batch, int64_t time);

// query [N, H, D] packed rows of the spans; key, value [B, T, H, D]. On a GPU bfloat16 by cuDNN; on the CPU
// composed operations of any floating type (tests). Returns the output [N, H, D] and the log-sum-exp [N, H]
// (float32, or float64 for float64).
std::tuple<at::Tensor, at::Tensor> staircase_attention(const at::Tensor& query, const at::Tensor& key,
                                                       const at::Tensor& value, const at::Tensor& spans,
                                                       double scale);

// The gradients of query [N, H, D], key and value [B, T, H, D].
std::tuple<at::Tensor, at::Tensor, at::Tensor> staircase_attention_backward(
    const at::Tensor& output_grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& output, const at::Tensor& logsumexp, const at::Tensor& spans, double scale);

}  // namespace oryx::operators
