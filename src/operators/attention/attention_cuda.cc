#include "operators/attention/attention_cuda.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>

#include "operators/attention/attention_dense.h"
#include "operators/attention/attention_kernels.h"
#include "operators/attention/attention_plan.h"
#include "operators/device/runtime.h"

namespace oryx::operators {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// In training, forward and backward, the kernels of this folder reach about this share of the rate of the
// library that computes all tokens. Forward alone they are as fast, and the library plans anew for every
// shape.
constexpr double kDenseShare = 0.8;

bool is_faster_dense(const AttentionPlan& plan, int64_t batch) {
  // A library sums the gradients of queries in any order.
  if (!plan.covers_all || plan.long_items.count == 0 || at::globalContext().deterministicAlgorithms())
    return false;
  const double all = static_cast<double>(batch) * plan.end * (plan.end + 1) / 2;
  return plan.pairs >= kDenseShare * all;
}

bool is_aligned(const at::Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

// Packed and aligned for 16-byte copies.
at::Tensor packed(const at::Tensor& x) {
  const at::Tensor result = x.contiguous();
  return is_aligned(result) ? result : result.clone();
}

// Rows contiguous and aligned, whatever lies between them.
at::Tensor with_aligned_rows(const at::Tensor& x) {
  bool fits = is_aligned(x) && x.stride(-1) == 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) fits &= x.stride(i) * x.element_size() % 16 == 0;
  return fits ? x : packed(x);
}

cuda::AttentionInputs describe(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               double scale, const AttentionPlan& plan) {
  cuda::AttentionInputs in{};
  in.query = query.const_data_ptr(), in.key = key.const_data_ptr(), in.value = value.const_data_ptr();
  for (int i = 0; i < 3; ++i) in.key_strides[i] = key.stride(i), in.value_strides[i] = value.stride(i);
  in.positions = plan.positions.const_data_ptr<int32_t>();
  in.query_heads = static_cast<int>(query.size(1)), in.key_heads = static_cast<int>(key.size(2));
  in.dim = static_cast<int>(query.size(2));
  in.scale = static_cast<float>(scale);
  return in;
}

std::shared_ptr<const AttentionPlan> plan_of(const at::Tensor& key, const at::Tensor& spans) {
  return attention_plan(spans, key.size(0), key.size(1), key.device());
}

// Gives the backward pass of heads of 128 room for the gradients of scores, as many heads at a time as fit
// evenly. For heads of 64 two more products cost less than the traffic: 1.78 ms for 2.21 on an H100 (a
// quarter of 2 × 16,384 queries, 12 heads).
at::Tensor keep_score_gradients(cuda::AttentionBackward& p, const KeyPlan& plan, const at::Tensor& query) {
  if (p.in.dim != 128) return {};
  const int64_t head_elements =
      plan.images * (cuda::kTileRows * cuda::kBlockKeys) * (p.in.query_heads / p.in.key_heads);
  const int64_t most = most_score_gradient_bytes / std::max<int64_t>(head_elements * query.element_size(), 1);
  if (plan.images == 0 || most == 0 || !cuda::has_backward_rings(p.in.dim)) return {};
  const int64_t slices = (p.in.key_heads + most - 1) / most, heads = (p.in.key_heads + slices - 1) / slices;
  const at::Tensor scratch = at::empty({heads * head_elements}, query.options());
  p.score_grads = scratch.data_ptr(), p.slice_heads = static_cast<int>(heads);
  p.tile_images = plan.tile_images.data(), p.images = plan.images;
  p.groups = plan.groups.data(), p.group_count = plan.groups.count;
  return scratch;
}

struct RowsFunction : torch::autograd::Function<RowsFunction> {
  static Variable forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                          const at::Tensor& value, const at::Tensor& spans, double scale) {
    auto [output, logsumexp] = attention_rows(query, key, value, spans, scale, true);
    context->save_for_backward({query, key, value, output, logsumexp});
    context->saved_data["spans"] =
        spans;  // not as a saved variable: plans are found by the tensor's identity
    context->saved_data["scale"] = scale;
    return output;
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &query = saved[0], &key = saved[1], &value = saved[2];
    const c10::OptionalDeviceGuard guard(query.device());
    const at::Tensor spans = context->saved_data["spans"].toTensor(), output_grad = packed(grads[0]);
    const auto plan = plan_of(key, spans);
    const auto keys = key_plan(spans, key.size(0), key.size(1), key.device());
    const at::Tensor query_grad = at::empty(query.sizes(), query.options()),
                     key_grad = at::empty(key.sizes(), query.options()),
                     value_grad = at::empty(value.sizes(), query.options()),
                     statistics =
                         at::empty({query.size(0), query.size(1), 2}, query.options().dtype(at::kFloat)),
                     tile_statistics = at::empty({query.size(1), keys->tiles.count, 2 * cuda::kTileRows},
                                                 statistics.options());
    cuda::AttentionBackward p{};
    p.in = describe(query, key, value, context->saved_data["scale"].toDouble(), *plan);
    p.in.items = plan->items.data(), p.in.item_count = plan->items.count;
    p.output = saved[3].const_data_ptr(), p.logsumexp = saved[4].const_data_ptr<float>();
    p.output_grad = output_grad.const_data_ptr();
    p.statistics = statistics.data_ptr<float>(), p.tile_statistics = tile_statistics.data_ptr<float>();
    p.query_grad = query_grad.data_ptr(), p.key_grad = key_grad.data_ptr(),
    p.value_grad = value_grad.data_ptr();
    p.rows = query.size(0), p.capacity = key.size(1);
    p.tiles = keys->tiles.data(), p.tile_positions = keys->tile_positions.data();
    p.tile_count = keys->tiles.count;
    p.blocks = keys->blocks.data(), p.block_count = keys->blocks.count;
    const at::Tensor scratch = keep_score_gradients(p, *keys, query);
    cuda::attention_backward(p, cuda::stream(query));
    return {query_grad, key_grad, value_grad, {}, {}};
  }
};

// The tokens of all sequences up to the end, with zeros where there is no row.
at::Tensor scattered(const at::Tensor& rows, const AttentionPlan& plan, int64_t batch) {
  const std::array shape{batch, plan.end, rows.size(1), rows.size(2)};
  if (plan.is_whole) return rows.view(shape);
  at::Tensor all = at::zeros({batch * plan.end, rows.size(1), rows.size(2)}, rows.options());
  return all.index_copy_(0, plan.tokens.to(at::kLong), rows).view(shape);
}

at::Tensor gathered(const at::Tensor& all, const AttentionPlan& plan) {
  const at::Tensor flat = all.reshape({-1, all.size(2), all.size(3)});
  return plan.is_whole ? flat.contiguous() : flat.index_select(0, plan.tokens);
}

// A query row without a span contributes nothing to any gradient as long as its output's gradient is zero.
struct DenseFunction : torch::autograd::Function<DenseFunction> {
  static Variable forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                          const at::Tensor& value, const at::Tensor& spans, double scale) {
    const auto plan = plan_of(key, spans);
    const DenseAttention state =
        dense_attention(scattered(query, *plan, key.size(0)), key.slice(1, 0, plan->end),
                        value.slice(1, 0, plan->end), scale);
    const at::Tensor output = gathered(state.output, *plan);
    context->save_for_backward({query, key, value, output, state.logsumexp, state.query_ends, state.key_ends,
                                state.seed, state.offset});
    context->saved_data["library"] = static_cast<int64_t>(state.library);
    context->saved_data["longest_query"] = state.longest_query;
    context->saved_data["longest_key"] = state.longest_key;
    context->saved_data["spans"] = spans;
    context->saved_data["scale"] = scale;
    return output;
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &query = saved[0], &key = saved[1], &value = saved[2];
    const int64_t batch = key.size(0);
    const auto plan = plan_of(key, context->saved_data["spans"].toTensor());
    const DenseAttention state{static_cast<DenseAttention::Library>(context->saved_data["library"].toInt()),
                               scattered(saved[3], *plan, batch),
                               saved[4],
                               saved[5],
                               saved[6],
                               saved[7],
                               saved[8],
                               context->saved_data["longest_query"].toInt(),
                               context->saved_data["longest_key"].toInt()};
    const auto [query_grad, key_grad, value_grad] = dense_attention_backward(
        scattered(grads[0].contiguous(), *plan, batch), scattered(query, *plan, batch),
        key.slice(1, 0, plan->end), value.slice(1, 0, plan->end), state,
        context->saved_data["scale"].toDouble());
    const auto whole = [&](const at::Tensor& grad) {  // [B, S, ...]
      const int64_t room = key.size(1) - plan->end;
      return room == 0 ? grad : at::constant_pad_nd(grad, {0, 0, 0, 0, 0, room});
    };
    return {gathered(query_grad, *plan), whole(key_grad), whole(value_grad), {}, {}};
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_rows(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value, const at::Tensor& spans,
                                                  double scale, bool keep_logsumexp) {
  const auto plan = plan_of(key, spans);
  const at::Tensor output = at::empty(query.sizes(), query.options());
  const at::Tensor logsumexp =
      keep_logsumexp ? at::empty({query.size(0), query.size(1)}, query.options().dtype(at::kFloat))
                     : at::Tensor();
  const cuda::AttentionInputs in = describe(query, key, value, scale, *plan);
  float* const logsumexp_data = keep_logsumexp ? logsumexp.data_ptr<float>() : nullptr;
  if (plan->long_items.count > 0) {
    cuda::AttentionForward p{in, plan->wide_items.data(), plan->wide_items.count, output.data_ptr(),
                             logsumexp_data};
    p.in.items = plan->long_items.data(), p.in.item_count = plan->long_items.count;
    cuda::attention_forward(p, cuda::stream(query));
  }
  if (plan->alone.count > 0) {
    const at::Tensor partials =
        at::empty({plan->splits.count, query.size(1), query.size(2) + 2}, query.options().dtype(at::kFloat));
    cuda::AttentionDecode p{};
    p.in = in;
    p.is_float32 = query.scalar_type() == at::kFloat;
    p.splits = plan->splits.data(), p.split_count = plan->splits.count;
    p.rows = plan->alone.data(), p.row_count = plan->alone.count;
    p.partials = partials.data_ptr<float>();
    p.output = output.data_ptr(), p.logsumexp = logsumexp_data;
    cuda::attention_decode(p, cuda::stream(query));
  }
  return {output, logsumexp};
}

at::Tensor attention_cuda(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const at::Tensor& spans, double scale, AttentionWay way) {
  const int64_t dim = query.size(2);
  const bool needs_grad =
      at::GradMode::is_enabled() && (query.requires_grad() || key.requires_grad() || value.requires_grad());
  const bool is_bfloat16 = query.scalar_type() == at::kBFloat16,
             is_regular = dim == value.size(3) && scale > 0;
  const bool has_kernel = is_regular && (dim == 64 || dim == 128) &&
                          (is_bfloat16 || (query.scalar_type() == at::kFloat && !needs_grad));
  const bool has_library = is_regular && is_bfloat16 && dim % 8 == 0 && dim <= 128;
  if (!has_kernel && !has_library) return attention_composed(query, key, value, spans, scale);
  const c10::OptionalDeviceGuard guard(query.device());
  const auto plan = plan_of(key, spans);
  const at::Tensor q = packed(query), k = with_aligned_rows(key), v = with_aligned_rows(value);
  if (has_library &&
      (way == AttentionWay::dense || (way == AttentionWay::automatic && (needs_grad || !has_kernel) &&
                                      is_faster_dense(*plan, key.size(0))))) {
    return DenseFunction::apply(q, k, v, spans, scale);
  }
  if (!has_kernel || (!is_bfloat16 && plan->long_items.count > 0)) {
    return attention_composed(query, key, value, spans, scale);
  }
  if (needs_grad) return RowsFunction::apply(q, k, v, spans, scale);
  return std::get<0>(attention_rows(q, k, v, spans, scale, false));
}

}  // namespace oryx::operators
