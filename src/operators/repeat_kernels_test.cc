// Kernels whose contract is the same bits every time: 200 repeats on a GPU, two under the emulator.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "operators/adamw/adamw.h"
#include "operators/attention/attention.h"
#include "operators/cross_entropy/cross_entropy.h"
#include "operators/decays/decays.h"
#include "operators/device/device_testing.h"
#include "operators/gated_linear/gated_linear.h"
#include "operators/gated_norm/gated_norm.h"
#include "operators/merge_rows/merge_rows.h"
#include "operators/prepare_heads/prepare_heads.h"
#include "operators/rotary/rotary.h"
#include "operators/testing.h"

namespace oryx::operators::testing {
namespace {

using Tensors = std::vector<at::Tensor>;

constexpr int64_t rows = is_emulated ? 37 : 3001, heads = is_emulated ? 2 : 8, dim = 64, width = heads * dim;

at::Tensor random(at::IntArrayRef sizes, at::ScalarType dtype = at::kBFloat16) {
  return at::randn(sizes, at::kFloat).to(dtype).to(kernel_device());
}

// `work` returns all results of a run.
void expect_same_bits(const std::function<Tensors()>& work) {
  Tensors first;
  for (int repeat = 0; repeat < (is_emulated ? 2 : 200); ++repeat) {
    const Tensors got = with_kernels(work);
    if (repeat == 0) first = got;
    for (size_t i = 0; i < got.size(); ++i)
      ASSERT_TRUE(at::equal(got[i], first[i])) << "repeat " << repeat << ", result " << i;
  }
}

// Outputs of function(inputs) and the gradients of all inputs.
void expect_passes_of_same_bits(const Tensors& inputs,
                                const std::function<Tensors(const Tensors&)>& function) {
  Tensors cotangents;
  expect_same_bits([&] {
    Tensors leaves;
    for (const at::Tensor& x : inputs) leaves.push_back(x.detach().set_requires_grad(true));
    const Tensors outputs = function(leaves);
    if (cotangents.empty()) {
      for (const at::Tensor& y : outputs)
        cotangents.push_back(y.dim() == 0 ? at::ones_like(y) : random(y.sizes(), y.scalar_type()));
    }
    Tensors results = gradients(outputs, leaves, cotangents);
    for (const at::Tensor& y : outputs) results.push_back(y.detach());
    return results;
  });
}

TEST(RepeatBitForBit, PrepareHeads) {
  const auto [cosine, sine] = rotary_tables(
      at::arange(rows, at::TensorOptions(at::kLong).device(kernel_device())), dim, 1e4, at::kFloat);
  const HeadSteps steps{.silu = true, .l2_norm = true, .cosine = cosine, .sine = sine};
  expect_passes_of_same_bits({random({1, rows, heads, dim})},
                             [&](const Tensors& x) { return Tensors{prepare_heads(x[0], steps)}; });
}

TEST(RepeatBitForBit, GatedLinear) {
  const at::Tensor weight = random({width, width});
  for (const char* order : {"after_gate", "before_gate"}) {
    expect_passes_of_same_bits(
        {random({rows, width}), random({rows, width}), random({dim}, at::kFloat), weight},
        [&](const Tensors& x) { return Tensors{gated_linear(x[0], x[1], x[2], 1e-5, order, x[3])}; });
  }
}

TEST(RepeatBitForBit, Decays) {
  const at::Tensor places = at::randperm(rows, at::kLong).to(kernel_device()).view({1, rows});
  expect_passes_of_same_bits({random({rows, heads}), random({heads}, at::kFloat), random({heads}, at::kFloat),
                              random({rows, heads})},
                             [&](const Tensors& x) {
                               const auto [log_decay, strength] = decays(x[0], x[1], x[2], x[3], places);
                               return Tensors{log_decay, strength};
                             });
}

TEST(RepeatBitForBit, AddNorm) {
  expect_passes_of_same_bits({random({rows, width}), random({rows, width}), random({width}, at::kFloat)},
                             [](const Tensors& x) {
                               const auto [sum, normed] = add_norm(x[0], x[1], x[2], 1e-5);
                               return Tensors{sum, normed};
                             });
}

TEST(RepeatBitForBit, Swiglu) {
  expect_passes_of_same_bits({random({rows, width}), random({rows, width})}, [](const Tensors& x) {
    return Tensors{gated_norm(x[0], x[1], std::nullopt, 1e-5, "after_gate")};
  });
}

TEST(RepeatBitForBit, CrossEntropy) {
  const int64_t vocabulary = is_emulated ? 97 : 5003;
  const at::Tensor targets = at::randint(vocabulary, {rows}, at::kLong).to(kernel_device());
  expect_passes_of_same_bits(
      {random({rows, width}), random({vocabulary, width}, at::kFloat)}, [&](const Tensors& x) {
        return Tensors{std::get<0>(cross_entropy(x[0], x[1], targets, 1e-3, /*rows_per_block=*/rows / 3))};
      });
}

TEST(RepeatBitForBit, AdamwAndGlobalNorm) {
  const auto make = [](double scale) {
    Tensors all;
    for (const int64_t size : {int64_t{1}, int64_t{1000}, rows * width})
      all.push_back(random({size}, at::kFloat) * scale);
    return all;
  };
  const Tensors parameters = make(1), gradients = make(1);
  expect_same_bits([&] {
    const Tensors first = make(0), second = make(0);
    Tensors results;
    for (const at::Tensor& p : parameters) results.push_back(p.clone());
    const Tensors updated = results;
    AdamwOptions options;
    options.gradient_scale_tensor = 1 / global_norm_device(gradients);
    adamw_step(updated, gradients, first, second, options);
    results.insert(results.end(), first.begin(), first.end());
    results.insert(results.end(), second.begin(), second.end());
    results.push_back(options.gradient_scale_tensor);
    return results;
  });
}

TEST(RepeatBitForBit, MergeRows) {
  const at::Tensor order = at::randperm(rows, at::kLong).to(kernel_device());
  const int64_t cut = rows / 3;
  const Tensors places = {order.slice(0, 0, cut), order.slice(0, cut)};
  expect_passes_of_same_bits({random({cut, width}), random({rows - cut, width})},
                             [&](const Tensors& x) { return Tensors{merge_rows(x, places, rows)}; });
}

TEST(RepeatBitForBit, AttentionOfOneRow) {
  const int64_t batch = 3, room = is_emulated ? 300 : 8192;
  at::Tensor spans = at::empty({batch, 3}, at::kLong);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t position = b == 0 ? room - 1 : b * room / 4;
    spans[b][0] = b, spans[b][1] = position, spans[b][2] = position + 1;
  }
  const at::Tensor query = random({batch, heads, dim}), key = random({batch, room, heads / 2, dim}),
                   value = random({batch, room, heads / 2, dim});
  expect_same_bits(
      [&] { return Tensors{attention(query, key, value, spans, 1 / std::sqrt(static_cast<double>(dim)))}; });
}

}  // namespace
}  // namespace oryx::operators::testing
