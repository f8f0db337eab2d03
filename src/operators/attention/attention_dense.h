// Causal attention of all tokens by the libraries that PyTorch carries, for calls whose spans cover most of
// them.
#pragma once

#include <ATen/core/Tensor.h>

namespace oryx::operators {

// What the library that ran the forward pass needs for its backward pass.
struct DenseAttention {
  enum Library : int64_t { cudnn, flash, cpu } library;
  at::Tensor output;  // [B, T, H, D]
  at::Tensor logsumexp, query_ends, key_ends, seed, offset;
  int64_t longest_query = 0, longest_key = 0;
};

// query [B, T, Hq, D], key and value [B, T, Hk, D], bfloat16 with D a multiple of 8, at most 128.
DenseAttention dense_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               double scale);

// Gradients of query, key and value, of their shapes.
std::tuple<at::Tensor, at::Tensor, at::Tensor> dense_attention_backward(
    const at::Tensor& output_grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const DenseAttention& state, double scale);

}  // namespace oryx::operators
