// What the tests of tensors with more than 2³¹ elements share: their last rows must be those of a small
// tensor with the same values. On a GPU only; up to 40 GB, one operator after another.
#pragma once

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "operators/device/device_testing.h"
#include "operators/testing.h"

namespace oryx::operators::testing {

using Tensors = std::vector<at::Tensor>;

class LargeTensors : public ::testing::Test {
 protected:
  void SetUp() override {
    if (is_emulated) GTEST_SKIP() << "needs a GPU";
    at::accelerator::emptyCache();
    const auto [free, total] = at::accelerator::getMemoryInfo(0);
    const double needed = 42e9;
    if (static_cast<double>(free) < needed)
      GTEST_SKIP() << "needs 42 GB of free memory on the GPU, which has " << free << " of " << total
                   << " bytes";
    at::manual_seed(1);
  }
  void TearDown() override {
    if (!is_emulated) at::accelerator::emptyCache();
  }
};

inline at::Tensor random(at::IntArrayRef sizes, at::ScalarType dtype = at::kBFloat16) {
  return at::empty(sizes, at::TensorOptions(dtype).device(kernel_device())).normal_();
}

inline at::Tensor spans_of(int64_t batch, int64_t time) {  // every token of every sequence
  const at::Tensor sequence = at::arange(batch, at::kLong);
  return at::stack({sequence, at::zeros_like(sequence), at::full_like(sequence, time)}, 1);
}

constexpr int64_t tokens = (int64_t{1} << 20) + 512, width = 2048;  // 2³¹ + 2²⁰ elements

// function(inputs) and its gradients for the cotangents at `large` inputs, and at their last `count` rows:
// the same last rows, up to `tolerance`, bit for bit where it is 0. All tensors have the same number of rows
// times a constant. The cotangent of every output is the first input of its shape.
inline void expect_last_rows(const Tensors& large, const std::vector<int64_t>& counts, double tolerance,
                             const std::function<Tensors(const Tensors&, bool)>& function,
                             const std::vector<int64_t>& output_counts) {
  const auto last = [](const at::Tensor& x, int64_t count) { return x.narrow(0, x.size(0) - count, count); };
  const auto run = [&](const Tensors& inputs, bool is_small) {
    Tensors leaves;
    for (const at::Tensor& x : inputs) leaves.push_back(x.detach().set_requires_grad(true));
    const Tensors outputs = function(leaves, is_small);
    Tensors cotangents;
    for (const at::Tensor& y : outputs) {
      for (const at::Tensor& x : inputs) {
        if (x.sizes() != y.sizes()) continue;
        cotangents.push_back(x);
        break;
      }
    }
    EXPECT_EQ(cotangents.size(), outputs.size());
    Tensors results;
    for (const at::Tensor& y : outputs) results.push_back(y.detach());
    for (const at::Tensor& g : gradients(outputs, leaves, cotangents)) results.push_back(g);
    return results;
  };
  Tensors small;
  for (size_t i = 0; i < large.size(); ++i) small.push_back(last(large[i], counts[i]).clone());
  const Tensors want = run(small, true);
  Tensors got;
  {
    const Tensors all = run(large, false);
    for (size_t i = 0; i < all.size(); ++i) {
      const int64_t count = i < output_counts.size() ? output_counts[i] : counts[i - output_counts.size()];
      got.push_back(last(all[i], count).clone());
    }
  }
  for (size_t i = 0; i < got.size(); ++i) {
    if (tolerance == 0) {
      EXPECT_TRUE(at::equal(got[i], want[i])) << "result " << i;
    } else {
      EXPECT_LE(relative_error(got[i], want[i]), tolerance) << "result " << i;
    }
  }
}

}  // namespace oryx::operators::testing
