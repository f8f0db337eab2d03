#include "operators/attention/attention_staircase.h"

#include <ATen/ATen.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>

#include <algorithm>

#include "base/device_copy.h"
#include "operators/activations.h"
#include "operators/device/runtime.h"
#include "operators/device/span_table.h"
#include "operators/linear/linear_kernels.h"

namespace oryx::operators {

namespace {

constexpr int64_t kShortestBlock = 512, kMostBlocks = 16;

int64_t block_count(int64_t time) {
  int64_t blocks = 1;
  while (blocks < kMostBlocks && time % (2 * blocks) == 0 && time / (2 * blocks) >= kShortestBlock)
    blocks *= 2;
  return blocks;
}

// One of the calls after the first: padded groups of `width` queries against `keys` keys each.
struct Step {
  int64_t keys = 0, width = 0, groups = 0;
  at::Tensor rows;    // int64 [n]: the packed rows that take part
  at::Tensor places;  // int64 [n]: where each stands among the groups · width padded queries
  at::Tensor source;  // int64 [groups · width]: the packed row of each padded query, −1 for none
};

struct Staircase {
  int64_t blocks = 1;
  at::Tensor token_of;  // int64 [N]: sequence · time + position of every packed row
  at::Tensor row_of;    // int64 [batch · time]: the packed row of every token, −1 for none
  std::vector<Step> steps;
};

std::shared_ptr<const Staircase> staircase(const at::Tensor& spans, int64_t batch, int64_t time,
                                           at::Device device) {
  static SpanCache<Staircase> cache;
  return cache.get(spans, batch, time, device, [&] {
    Staircase plan;
    plan.blocks = block_count(time);
    std::vector<int64_t> token_of, row_of(static_cast<size_t>(batch * time), -1);
    const auto span = spans.accessor<int64_t, 2>();
    for (int64_t i = 0; i < span.size(0); ++i) {
      for (int64_t t = span[i][1]; t < span[i][2]; ++t) {
        row_of[static_cast<size_t>(span[i][0] * time + t)] = static_cast<int64_t>(token_of.size());
        token_of.push_back(span[i][0] * time + t);
      }
    }
    const auto send = [&](const std::vector<int64_t>& values) {
      return copy_to(at::tensor(values, at::kLong), device);
    };
    for (int64_t keys = time / plan.blocks; keys < time; keys *= 2) {
      Step step;
      step.keys = keys;
      step.groups = batch * time / (2 * keys);
      std::vector<std::vector<int64_t>> members(static_cast<size_t>(step.groups));
      for (size_t row = 0; row < token_of.size(); ++row) {
        const int64_t token =
            token_of[row];  // groups follow each other: the sequences are whole numbers of them
        if (token / keys % 2 == 1)
          members[static_cast<size_t>(token / (2 * keys))].push_back(static_cast<int64_t>(row));
      }
      for (const auto& group : members) step.width = std::max(step.width, static_cast<int64_t>(group.size()));
      if (step.width == 0) continue;
      std::vector<int64_t> rows, places, source(static_cast<size_t>(step.groups * step.width), -1);
      for (int64_t group = 0; group < step.groups; ++group) {
        int64_t place = group * step.width;
        for (const int64_t row : members[static_cast<size_t>(group)]) {
          rows.push_back(row);
          places.push_back(place);
          source[static_cast<size_t>(place++)] = row;
        }
      }
      step.rows = send(rows);
      step.places = send(places);
      step.source = send(source);
      plan.steps.push_back(step);
    }
    plan.token_of = send(token_of);
    plan.row_of = send(row_of);
    return plan;
  });
}

// from[index[r]] for every r, zeros where the index is −1; `from` [R, …] contiguous.
at::Tensor pick(const at::Tensor& from, const at::Tensor& index) {
  std::vector<int64_t> sizes = from.sizes().vec();
  sizes[0] = index.numel();
  if (!cuda::serves(from)) {
    at::Tensor taken = from.index_select(0, index.clamp_min(0));
    std::vector<int64_t> ones(sizes.size(), 1);
    ones[0] = index.numel();
    return taken * (index >= 0).view(ones).to(taken.scalar_type());
  }
  at::Tensor taken = at::empty(sizes, from.options());
  cuda::gather_rows({index.const_data_ptr<int64_t>(), index.numel(),
                     static_cast<int64_t>(from.nbytes()) / std::max<int64_t>(1, from.size(0))},
                    from.const_data_ptr(), taken.mutable_data_ptr(), cuda::stream(from));
  return taken;
}

// to[rows[r]] += from[r]; the rows are distinct.
void add(const at::Tensor& from, const at::Tensor& rows, at::Tensor& to) {
  if (!cuda::serves(to)) {
    to.index_add_(0, rows, from.to(to.scalar_type()));
    return;
  }
  const at::Tensor added = from.to(to.scalar_type()).contiguous();
  cuda::add_rows({rows.const_data_ptr<int64_t>(), rows.numel(),
                  static_cast<int64_t>(to.nbytes()) / std::max<int64_t>(1, to.size(0))},
                 added.const_data_ptr(), to.mutable_data_ptr(), to.scalar_type() == at::kBFloat16,
                 cuda::stream(to));
}

// A call of the library: query [G, Q, H, D], key and value [G, K, H, D]; output and gradients alike,
// log-sum-exp [G, Q, H].
struct Piece {
  at::Tensor output, logsumexp;
};

at::Tensor heads_first(const at::Tensor& x) { return x.transpose(1, 2); }

at::Tensor scores(const at::Tensor& query, const at::Tensor& key, bool causal, double scale) {
  at::Tensor s = scale * at::matmul(heads_first(query), heads_first(key).transpose(2, 3));
  if (!causal) return s;
  const at::Tensor later = at::ones({query.size(1), key.size(1)}, s.options().dtype(at::kBool)).triu(1);
  return s.masked_fill(later, -INFINITY);
}

Piece piece(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool causal,
            double scale) {
  if (query.is_cpu()) {
    const at::Tensor s = scores(query, key, causal, scale);
    return {heads_first(at::matmul(s.softmax(-1), heads_first(value))),
            at::logsumexp(s, {-1}).transpose(1, 2)};
  }
  const auto result =
      at::_scaled_dot_product_cudnn_attention(heads_first(query), heads_first(key), heads_first(value), {},
                                              /*compute_log_sumexp=*/true, 0.0, causal, false, scale);
  return {heads_first(std::get<0>(result)),
          std::get<1>(result).view({query.size(0), query.size(2), query.size(1)}).transpose(1, 2)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> piece_backward(
    const at::Tensor& output_grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& output, const at::Tensor& logsumexp, bool causal, double scale) {
  const at::Tensor q = heads_first(query), k = heads_first(key), v = heads_first(value),
                   o = heads_first(output), grad = heads_first(output_grad), lse = heads_first(logsumexp);
  if (query.is_cpu()) {
    const at::Tensor p = (scores(query, key, causal, scale) - lse.unsqueeze(3)).exp();
    const at::Tensor slope =
        p * (at::matmul(grad, v.transpose(2, 3)) - (grad * o).sum(-1, /*keepdim=*/true)) * scale;
    return {heads_first(at::matmul(slope, k)), heads_first(at::matmul(slope.transpose(2, 3), q)),
            heads_first(at::matmul(p.transpose(2, 3), grad))};
  }
  const at::Tensor unused =
      at::zeros({}, query.options().dtype(at::kLong));  // of dropout, which there is none of
  const auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
      grad, q, k, v, o, lse.unsqueeze(3).contiguous(), unused, unused, {}, {}, {}, query.size(1), key.size(1),
      0.0, causal, scale);
  return {heads_first(dq), heads_first(dk), heads_first(dv)};
}

// The left halves of runs of 2 · keys tokens: a view [groups, keys, H, D].
at::Tensor left_halves(const at::Tensor& x, int64_t keys) {
  return x.reshape({-1, 2 * keys, x.size(2), x.size(3)}).narrow(1, 0, keys);
}

at::Tensor in_blocks(const at::Tensor& rows, const at::Tensor& like, int64_t blocks) {
  return rows.view({like.size(0) * blocks, like.size(1) / blocks, rows.size(1), rows.size(2)});
}

bool has_no_token_twice(const at::Tensor& spans, int64_t batch, int64_t time) {
  std::vector<bool> seen(static_cast<size_t>(batch * time), false);
  const auto span = spans.accessor<int64_t, 2>();
  for (int64_t i = 0; i < span.size(0); ++i) {
    for (int64_t t = span[i][1]; t < span[i][2]; ++t) {
      const auto token = static_cast<size_t>(span[i][0] * time + t);
      if (seen[token]) return false;
      seen[token] = true;
    }
  }
  return true;
}

}  // namespace

bool fits_staircase(const at::Tensor& spans, int64_t batch, int64_t time) {
  static SpanCache<bool> cache;
  return block_count(time) >= 4 &&
         *cache.get(spans, batch, time, at::kCPU, [&] { return has_no_token_twice(spans, batch, time); });
}

std::tuple<at::Tensor, at::Tensor> staircase_attention(const at::Tensor& query, const at::Tensor& key,
                                                       const at::Tensor& value, const at::Tensor& spans,
                                                       double scale) {
  const auto plan = staircase(spans, key.size(0), key.size(1), query.device());
  const int64_t rows = query.size(0), heads = query.size(1), dim = query.size(2);
  const at::Tensor packed = query.contiguous();
  const Piece own = piece(in_blocks(pick(packed, plan->row_of), key, plan->blocks),
                          in_blocks(key.flatten(0, 1), key, plan->blocks),
                          in_blocks(value.flatten(0, 1), key, plan->blocks), /*causal=*/true, scale);
  const at::Tensor own_logsumexp = own.logsumexp.reshape({-1, heads}).index_select(0, plan->token_of);
  std::vector<at::Tensor> outputs, sums = {own_logsumexp};
  for (const Step& step : plan->steps) {
    const Piece part =
        piece(pick(packed, step.source).view({step.groups, step.width, heads, dim}),
              left_halves(key, step.keys), left_halves(value, step.keys), /*causal=*/false, scale);
    outputs.push_back(pick(part.output.reshape({-1, heads, dim}), step.places));
    at::Tensor sum = at::full({rows, heads}, -INFINITY, own_logsumexp.options());
    sum.index_copy_(0, step.rows, part.logsumexp.reshape({-1, heads}).index_select(0, step.places));
    sums.push_back(sum);
  }
  const at::Tensor all = at::stack(sums), total = at::logsumexp(all, {0}), shares = (all - total).exp();
  at::Tensor output = pick(own.output.reshape({-1, heads, dim}), plan->token_of) * shares[0].unsqueeze(2);
  for (size_t i = 0; i < plan->steps.size(); ++i) {
    const at::Tensor share = shares[static_cast<int64_t>(i) + 1].index_select(0, plan->steps[i].rows);
    add(outputs[i] * share.unsqueeze(2), plan->steps[i].rows, output);
  }
  return {output.to(query.scalar_type()), total};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> staircase_attention_backward(
    const at::Tensor& output_grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& output, const at::Tensor& logsumexp, const at::Tensor& spans, double scale) {
  const auto plan = staircase(spans, key.size(0), key.size(1), query.device());
  const int64_t heads = query.size(1), dim = query.size(2);
  const at::Tensor grad = output_grad.contiguous(), packed = query.contiguous();
  const auto blocks = [&](const at::Tensor& x) {
    return in_blocks(pick(x, plan->row_of), key, plan->blocks);
  };
  const at::Tensor own_logsumexp =
      pick(logsumexp, plan->row_of).view({key.size(0) * plan->blocks, key.size(1) / plan->blocks, heads});
  const auto [dq, dk, dv] =
      piece_backward(blocks(grad), blocks(packed), in_blocks(key.flatten(0, 1), key, plan->blocks),
                     in_blocks(value.flatten(0, 1), key, plan->blocks), blocks(output), own_logsumexp,
                     /*causal=*/true, scale);
  at::Tensor query_grad = pick(dq.reshape({-1, heads, dim}), plan->token_of);
  at::Tensor key_grad = dk.reshape(key.sizes()).contiguous(),
             value_grad = dv.reshape(value.sizes()).contiguous();
  for (const Step& step : plan->steps) {
    const auto padded = [&](const at::Tensor& x) {
      return pick(x, step.source).view({step.groups, step.width, heads, dim});
    };
    const at::Tensor step_logsumexp = pick(logsumexp, step.source).view({step.groups, step.width, heads});
    const auto [step_dq, step_dk, step_dv] = piece_backward(
        padded(grad), padded(packed), left_halves(key, step.keys), left_halves(value, step.keys),
        padded(output), step_logsumexp, /*causal=*/false, scale);
    add(pick(step_dq.reshape({-1, heads, dim}), step.places), step.rows, query_grad);
    left_halves(key_grad, step.keys).add_(step_dk);
    left_halves(value_grad, step.keys).add_(step_dv);
  }
  return {query_grad, key_grad, value_grad};
}

}  // namespace oryx::operators
