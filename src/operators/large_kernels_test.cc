// Kernels on tensors of more than 2³¹ elements.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cmath>

#include "operators/adamw/adamw.h"
#include "operators/attention/attention.h"
#include "operators/attention/attention_cuda.h"
#include "operators/cross_entropy/cross_entropy.h"
#include "operators/gated_norm/gated_norm.h"
#include "operators/large_testing.h"
#include "operators/linear/linear.h"
#include "operators/merge_rows/merge_rows.h"
#include "operators/prepare_heads/prepare_heads.h"
#include "operators/rotary/rotary.h"
#include "operators/short_conv/short_conv.h"
#include "operators/ssd/ssd.h"

namespace oryx::operators::testing {
namespace {

TEST_F(LargeTensors, Attention) {
  const int64_t time = 512, batch = tokens / time, heads = 16, dim = 128;
  const at::Tensor query = random({tokens, heads, dim}), key = random({batch, time, heads, dim}),
                   value = random({batch, time, heads, dim});
  const at::Tensor all = spans_of(batch, time), one = spans_of(1, time);
  expect_last_rows({query, key, value}, {time, 1, 1}, 0,
                   [&](const Tensors& x, bool is_small) {
                     return Tensors{attention_cuda(x[0], x[1], x[2], is_small ? one : all,
                                                   std::sqrt(1.0 / dim), AttentionWay::rows)};
                   },
                   {time});
}

TEST_F(LargeTensors, AttentionOfOneRow) {
  const c10::NoGradGuard no_grad;
  const int64_t batch = 9, room = 131072, heads = 16, dim = 128;
  const at::Tensor query = random({batch, heads, dim}), key = random({batch, room, heads, dim}),
                   value = random({batch, room, heads, dim});
  const auto spans = [&](int64_t count) {
    const at::Tensor sequence = at::arange(count, at::kLong), end = at::full_like(sequence, room);
    return at::stack({sequence, end - 1, end}, 1);
  };
  const at::Tensor got = attention(query, key, value, spans(batch), 0.1),
                   want = attention(query.narrow(0, batch - 1, 1), key.narrow(0, batch - 1, 1),
                                    value.narrow(0, batch - 1, 1), spans(1), 0.1);
  EXPECT_TRUE(at::equal(got.narrow(0, batch - 1, 1), want));
}

// How many segments a sequence is cut into depends on its neighbours: the same up to rounding.
TEST_F(LargeTensors, Ssd) {
  const int64_t time = 512, batch = tokens / time, heads = 16;
  const at::Tensor all = spans_of(batch, time), one = spans_of(1, time);
  for (const int64_t key_dim : {64, 128}) {
    const int64_t value_dim = 192 - key_dim;
    Tensors inputs = {random({tokens, heads, key_dim}), random({batch, time, heads, key_dim}),
                      random({batch, time, heads, value_dim}),
                      random({batch, time, heads}, at::kFloat).abs_().mul_(-0.1),
                      random({batch, time, heads}, at::kFloat).abs_()};
    inputs[1].mul_(0.1);
    expect_last_rows(inputs, {time, 1, 1, 1, 1}, 1e-2,
                     [&](const Tensors& x, bool is_small) {
                       const auto [output, state] = ssd(x[0], x[1], x[2], x[3], x[4], std::nullopt,
                                                        is_small ? one : all, std::nullopt);
                       return Tensors{output.view(x[2].sizes())};
                     },
                     {1});
    at::accelerator::emptyCache();
  }
  const c10::NoGradGuard no_grad;  // forward, with all inputs large
  const at::Tensor query = random({tokens, heads, 128}), key = random({batch, time, heads, 128}).mul_(0.1),
                   value = random({batch, time, heads, 128});
  const at::Tensor log_decay = random({batch, time, heads}, at::kFloat).abs_().mul_(-0.1);
  const auto [got, state] = ssd(query, key, value, log_decay, -log_decay, std::nullopt, all, std::nullopt);
  const auto [want, want_state] = ssd(query.narrow(0, tokens - time, time), key.narrow(0, batch - 1, 1),
                                      value.narrow(0, batch - 1, 1), log_decay.narrow(0, batch - 1, 1),
                                      -log_decay.narrow(0, batch - 1, 1), std::nullopt, one, std::nullopt);
  EXPECT_LE(relative_error(got.narrow(0, tokens - time, time), want), 1e-2);
  EXPECT_LE(relative_error(state.narrow(0, batch - 1, 1), want_state), 1e-2);
}

TEST_F(LargeTensors, GatedNorm) {
  const at::Tensor weight = random({width}, at::kFloat), head_weight = random({128}, at::kFloat);
  const Tensors inputs = {random({tokens, width}), random({tokens, width})};
  for (const char* order : {"after_gate", "before_gate", "swiglu"}) {
    expect_last_rows(
        inputs, {8, 8}, 0,
        [&](const Tensors& x, bool) {
          const std::string_view kind = order;
          if (kind == "swiglu") return Tensors{gated_norm(x[0], x[1], std::nullopt, 1e-5, "after_gate")};
          return Tensors{gated_norm(x[0], x[1], kind == "after_gate" ? weight : head_weight, 1e-5, kind)};
        },
        {8});
    at::accelerator::emptyCache();
  }
}

TEST_F(LargeTensors, AddNorm) {
  const at::Tensor weight = random({width}, at::kFloat);
  expect_last_rows({random({tokens, width}), random({tokens, width})}, {8, 8}, 0,
                   [&](const Tensors& x, bool) {
                     const auto [sum, normed] = add_norm(x[0], x[1], weight, 1e-5);
                     return Tensors{sum, normed};
                   },
                   {8, 8});
}

TEST_F(LargeTensors, ShortConv) {
  const at::Tensor weight = random({2 * width, 4}, at::kFloat);
  expect_last_rows(
      {random({tokens / 1024 + 1, 512, 2 * width})}, {1}, 0,
      [&](const Tensors& x, bool) {
        return Tensors{std::get<0>(short_conv(x[0], weight, std::nullopt, std::nullopt, "silu"))};
      },
      {1});
}

TEST_F(LargeTensors, PrepareHeads) {
  const int64_t time = 512, dim = 128;
  const auto [cosine, sine] = rotary_tables(
      at::arange(time, at::TensorOptions(at::kLong).device(kernel_device())), dim, 1e4, at::kFloat);
  const HeadSteps steps{.silu = true, .l2_norm = true, .cosine = cosine, .sine = sine};
  expect_last_rows({random({tokens / time, time, width / dim, dim})}, {1}, 0,
                   [&](const Tensors& x, bool) { return Tensors{prepare_heads(x[0], steps)}; }, {1});
}

// Logits of more than 2³¹ elements at once.
TEST_F(LargeTensors, CrossEntropy) {
  const int64_t rows = 65536, vocabulary = 33000, few = 64;
  const at::Tensor hidden = random({rows, 64}), weight = random({vocabulary, 64}).mul_(0.1);
  const at::Tensor targets =
      at::randint(vocabulary, {rows}, at::TensorOptions(at::kLong).device(kernel_device()));
  const auto run = [&](int64_t count) {
    const at::Tensor x = hidden.narrow(0, rows - count, count).detach().clone().set_requires_grad(true);
    const auto [loss, losses] =
        cross_entropy(x, weight, targets.narrow(0, rows - count, count), 1.0, /*rows_per_block=*/count);
    const at::Tensor gradient = gradients({loss}, {x}, {at::ones_like(loss)})[0];
    return Tensors{losses.narrow(0, count - few, few), gradient.narrow(0, count - few, few)};
  };
  const Tensors got = run(rows), want = run(few);
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LE(relative_error(got[i], want[i]), 1e-2) << i;
}

TEST_F(LargeTensors, MergeRows) {
  const c10::NoGradGuard no_grad;
  const int64_t cut = 1000, few = 16;
  const auto options = at::TensorOptions(at::kLong).device(kernel_device());
  const Tensors parts = {random({cut, width}), random({tokens - cut, width})},
                rows = {at::arange(cut, options), at::arange(cut, tokens, options)};
  const at::Tensor merged = merge_rows(parts, rows, tokens);
  EXPECT_TRUE(at::equal(merged.narrow(0, tokens - few, few), parts[1].narrow(0, tokens - cut - few, few)));
  EXPECT_TRUE(at::equal(merged.narrow(0, 0, cut), parts[0]));
  const c10::AutoGradMode grad(true);
  Tensors leaves;
  for (const at::Tensor& x : parts) leaves.push_back(x.detach().set_requires_grad(true));
  const Tensors gathered = gradients({merge_rows(leaves, rows, tokens)}, leaves, {merged});
  EXPECT_TRUE(
      at::equal(gathered[1].narrow(0, tokens - cut - few, few), parts[1].narrow(0, tokens - cut - few, few)));
  EXPECT_TRUE(at::equal(gathered[0], parts[0]));
}

// A weight of more than 2³¹ elements; two rows take the kernel for decoding, 32 the rounding of the weight.
TEST_F(LargeTensors, Linear) {
  const c10::NoGradGuard no_grad;
  const int64_t few = 64;
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
    const at::Tensor weight = random({tokens, width}, dtype);
    for (const int64_t rows : {2, 32}) {
      const at::Tensor x = random({rows, width});
      EXPECT_LE(relative_error(operators::linear(x, weight).narrow(1, tokens - few, few),
                               operators::linear(x, weight.narrow(0, tokens - few, few))),
                5e-3);
    }
  }
}

TEST_F(LargeTensors, Adamw) {
  const int64_t size = tokens * width, few = 1000;
  const auto last = [&](const at::Tensor& x) { return x.narrow(0, size - few, few); };
  const at::Tensor p = random({size}, at::kFloat), g = random({size}, at::kFloat), m = at::zeros_like(p),
                   v = at::zeros_like(p);
  const at::Tensor small[4] = {last(p).clone(), last(g).clone(), last(m).clone(), last(v).clone()};
  adamw_step({p}, {g}, {m}, {v}, {});
  adamw_step({small[0]}, {small[1]}, {small[2]}, {small[3]}, {});
  EXPECT_TRUE(at::equal(last(p), small[0]));
  EXPECT_TRUE(at::equal(last(m), small[2]));
  EXPECT_TRUE(at::equal(last(v), small[3]));
  const double whole = global_norm({g}), begin = global_norm({g.narrow(0, 0, size - few)}),
               end = global_norm({last(g)});
  EXPECT_NEAR(whole, std::hypot(begin, end), 1e-9 * whole);
  EXPECT_GT(end, 0);
}

}  // namespace
}  // namespace oryx::operators::testing
