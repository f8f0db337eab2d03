// Attention on a GPU: which way a call takes, and the kernels of attention_kernels.h behind torch's tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace oryx::operators {

// `rows` computes the rows of the spans by the kernels of this folder, `dense` all tokens by a library;
// automatic takes the one that is faster. Tests ask for one of them.
enum class AttentionWay { automatic, rows, dense };

// As attention() says, for checked arguments.
at::Tensor attention_cuda(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const at::Tensor& spans, double scale, AttentionWay way = AttentionWay::automatic);

// The forward pass of `rows` alone: output and, where asked for, log-sum-exp [N, Hq] float32. bfloat16, head
// dimensions 64 or 128; rows of key and value aligned to 16 bytes. float32 where every row is alone in its
// sequence.
std::tuple<at::Tensor, at::Tensor> attention_rows(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value, const at::Tensor& spans,
                                                  double scale, bool keep_logsumexp);

// Scratch of backward that may hold gradients of scores, for some heads at a time; where one does not fit
// they are computed twice. A test tries less.
inline int64_t most_score_gradient_bytes = int64_t{3} << 29;

// For everything that no kernel serves: composed ATen operations, one masked product per sequence. Any device
// and dtype; autograd follows it and keeps the probabilities.
at::Tensor attention_composed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& spans, double scale);

}  // namespace oryx::operators
