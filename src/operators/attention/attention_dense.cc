#include "operators/attention/attention_dense.h"

#include <ATen/ATen.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>

namespace oryx::operators {

namespace {

at::Tensor heads_first(const at::Tensor& x) { return x.transpose(1, 2); }

// One key head per query head: the libraries differ in how they take groups.
at::Tensor repeated(const at::Tensor& x, int64_t heads) {
  return x.size(2) == heads ? x : x.repeat_interleave(heads / x.size(2), 2);
}

at::Tensor summed(const at::Tensor& grad, int64_t heads) {
  if (grad.size(2) == heads) return grad;
  return grad.reshape({grad.size(0), grad.size(1), heads, grad.size(2) / heads, grad.size(3)})
      .sum(3, /*keepdim=*/false, at::kFloat)
      .to(grad.scalar_type());
}

}  // namespace

DenseAttention dense_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               double scale) {
  const at::Tensor q = heads_first(query), k = heads_first(repeated(key, query.size(2))),
                   v = heads_first(repeated(value, query.size(2)));
  const auto keep = [](DenseAttention::Library library, const auto& result) {
    return DenseAttention{library,
                          heads_first(std::get<0>(result)),
                          std::get<1>(result),
                          std::get<2>(result),
                          std::get<3>(result),
                          std::get<6>(result),
                          std::get<7>(result),
                          std::get<4>(result).expect_int(),
                          std::get<5>(result).expect_int()};
  };
  if (query.is_cpu()) {
    const auto [output, logsumexp] =
        at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, true, {}, scale);
    return {DenseAttention::cpu, heads_first(output), logsumexp, {}, {}, {}, {}};
  }
  try {
    return keep(DenseAttention::cudnn,
                at::_scaled_dot_product_cudnn_attention(q, k, v, {}, /*compute_log_sumexp=*/true, 0.0,
                                                        /*is_causal=*/true, false, scale));
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const c10::Error&) {  // no cuDNN, or one that does not serve this GPU
    return keep(DenseAttention::flash,
                at::_scaled_dot_product_flash_attention(q, k, v, 0.0, /*is_causal=*/true, false, scale));
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dense_attention_backward(
    const at::Tensor& output_grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const DenseAttention& state, double scale) {
  const at::Tensor q = heads_first(query), k = heads_first(repeated(key, query.size(2))),
                   v = heads_first(repeated(value, query.size(2))), o = heads_first(state.output),
                   grad = heads_first(output_grad);
  std::tuple<at::Tensor, at::Tensor, at::Tensor> grads;
  switch (state.library) {
    case DenseAttention::cudnn:
      grads = at::_scaled_dot_product_cudnn_attention_backward(
          grad, q, k, v, o, state.logsumexp, state.seed, state.offset, {}, state.query_ends, state.key_ends,
          state.longest_query, state.longest_key, 0.0, true, scale);
      break;
    case DenseAttention::flash:
      grads = at::_scaled_dot_product_flash_attention_backward(
          grad, q, k, v, o, state.logsumexp, state.query_ends, state.key_ends, state.longest_query,
          state.longest_key, 0.0, true, state.seed, state.offset, scale);
      break;
    case DenseAttention::cpu:
      grads = at::_scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, o, state.logsumexp, 0.0,
                                                                       true, {}, scale);
      break;
  }
  const auto& [q_grad, k_grad, v_grad] = grads;
  return {heads_first(q_grad), summed(heads_first(k_grad), key.size(2)),
          summed(heads_first(v_grad), key.size(2))};
}

}  // namespace oryx::operators
