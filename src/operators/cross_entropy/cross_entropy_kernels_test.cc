#include <cmath>

#include "operators/activations.h"
#include "operators/cross_entropy/cross_entropy.h"
#include "operators/cross_entropy/cross_entropy_cuda.h"
#include "operators/device/device_testing.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::kernel_device;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;

[[maybe_unused]] const bool is_poisoned = testing::poison_fresh_memory();

struct Case {
  int64_t rows, dim, vocabulary;
  bool on_gpu_only = false;
};

// The last but one does not fit the shared memory of a block in float64; odd vocabularies are read element by
// element.
const Case cases[] = {{70, 32, 257},          {1, 8, 1},     {33, 16, 1000}, {0, 4, 10},
                      {9, 8, 8192},           {2, 8, 30000}, {5, 16, 15},    {4096, 768, 50304, true},
                      {777, 512, 50257, true}};

at::Tensor leaf(const at::Tensor& t) { return t.detach().clone().set_requires_grad(true); }

TEST(CrossEntropyKernels, MatchReference) {
  at::manual_seed(1);
  for (const Case& c : cases) {
    if (testing::wants_small_cases() && c.on_gpu_only) continue;
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      if (c.on_gpu_only && dtype == at::kDouble) continue;
      // Gradients of bfloat16 carry the rounding of the logits' gradients and of the products.
      const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 2e-6 : 5e-3;
      const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
      const at::Tensor hidden = leaf(at::randn({c.rows, c.dim}, options));
      const at::Tensor weight = leaf((at::randn({c.vocabulary, c.dim}, options.dtype(at::kDouble)) /
                                      std::sqrt(static_cast<double>(c.dim)))
                                         .to(dtype));
      const at::Tensor targets = at::randint(c.vocabulary, {c.rows}, options.dtype(at::kLong));
      for (int64_t r = 2; r < c.rows; r += 5) targets[r] = -1 - r;
      const Tensors truth = {leaf(hidden.to(at::kDouble)), leaf(weight.to(at::kDouble))};
      const auto [want, want_losses] = cross_entropy_reference(truth[0], truth[1], targets, 0.25);
      const Tensors expected = testing::gradients({want}, truth, {at::full_like(want, 3)});
      for (const int64_t block : {0, 13}) {
        if (c.on_gpu_only && block != 0) continue;
        const Tensors got = testing::with_kernels([&] {
          const auto [loss, losses] = cross_entropy(hidden, weight, targets, 0.25, block);
          Tensors results = testing::gradients({loss}, {hidden, weight}, {at::full_like(loss, 3)});
          c10::NoGradGuard no_grad;
          EXPECT_TRUE(at::equal(std::get<1>(cross_entropy(hidden, weight, targets, 1, block)), losses));
          results.push_back(losses);
          results.push_back(loss.detach());
          return results;
        });
        const Tensors truths = {expected[0], expected[1], want_losses, want.detach()};
        for (size_t i = 0; i < got.size(); ++i) {
          EXPECT_LE(relative_error(got[i], truths[i]), i < 2 && dtype == at::kBFloat16 ? 8e-3 : tolerance)
              << "result " << i << " of " << c.rows << " x " << c.vocabulary << " " << at::toString(dtype);
        }
      }
    }
  }
}

// Without the products around them, which tools that watch every access cannot always follow.
TEST(CrossEntropyKernels, MatchReferenceWithoutProducts) {
  at::manual_seed(3);
  for (const Case& c : cases) {
    if (c.rows == 0 || (testing::wants_small_cases() && c.on_gpu_only)) continue;
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      if (c.on_gpu_only && dtype == at::kDouble) continue;
      const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
      const auto wide = options.dtype(accumulate_type(dtype));
      const at::Tensor logits = at::randn({c.rows, c.vocabulary}, options) * 3;
      const at::Tensor targets = at::randint(c.vocabulary, {c.rows}, options.dtype(at::kLong));
      const at::Tensor upstream = at::full({}, 3, wide);
      const Tensors got = testing::with_kernels([&] {
        const at::Tensor gradient = logits.clone(), losses = at::empty({c.rows}, wide);
        cuda::softmax_loss({.dtype = dtype,
                            .rows = c.rows,
                            .columns = c.vocabulary,
                            .logits = gradient.mutable_data_ptr(),
                            .targets = targets.const_data_ptr<int64_t>(),
                            .losses = losses.mutable_data_ptr(),
                            .scale = 0.25,
                            .gradient = true},
                           gradient);
        cuda::multiply_gradient(gradient, upstream);
        return Tensors{gradient, losses};
      });
      const at::Tensor log_p = at::log_softmax(logits.to(at::kDouble), 1), columns = targets.unsqueeze(1);
      const at::Tensor want =
          log_p.exp().scatter_add(1, columns, at::full_like(columns, -1, log_p.options()));
      const double tolerance = dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 2e-6 : 8e-3;
      EXPECT_LE(relative_error(got[0], want * 0.75), tolerance) << c.vocabulary << at::toString(dtype);
      EXPECT_LE(relative_error(got[1], -log_p.gather(1, columns).squeeze(1)), std::min(tolerance, 2e-6))
          << c.vocabulary << at::toString(dtype);
    }
  }
}

TEST(CrossEntropyKernels, UnitUpstreamLeavesTheGradient) {
  at::manual_seed(2);
  const auto options = at::TensorOptions(kernel_device()).dtype(at::kBFloat16);
  const at::Tensor hidden = leaf(at::randn({20, 16}, options)), weight = leaf(at::randn({64, 16}, options));
  const at::Tensor targets = at::randint(64, {20}, options.dtype(at::kLong));
  testing::with_kernels([&] {
    Tensors results;
    for (const double upstream : {1., 2.}) {
      const at::Tensor loss = std::get<0>(cross_entropy(hidden, weight, targets, 1));
      for (const at::Tensor& g :
           testing::gradients({loss}, {hidden, weight}, {at::full_like(loss, upstream)}))
        results.push_back(g);
    }
    for (int i : {0, 1}) EXPECT_TRUE(at::equal(results[i] * 2, results[i + 2]));
    return results;
  });
}

TEST(CrossEntropyKernels, TargetPastTheVocabularyGivesNaN) {
  const auto options = at::TensorOptions(kernel_device()).dtype(at::kFloat);
  const at::Tensor hidden = leaf(at::ones({2, 4}, options)), weight = leaf(at::ones({8, 4}, options));
  const at::Tensor targets = at::tensor({1, 8}, at::kLong).to(kernel_device());
  const Tensors got = testing::with_kernels([&] {
    const auto [loss, losses] = cross_entropy(hidden, weight, targets, 1);
    const Tensors g = testing::gradients({loss}, {hidden, weight}, {at::ones_like(loss)});
    return Tensors{loss.detach(), losses, g[0], g[1]};
  });
  EXPECT_TRUE(got[0].isnan().item<bool>());
  EXPECT_FLOAT_EQ(got[1][0].item<float>(), std::log(8.f));
  EXPECT_TRUE(got[2][0].isfinite().all().item<bool>());
  EXPECT_TRUE(got[2][1].isnan().all().item<bool>());
}

TEST(CrossEntropyKernels, LargeLogitsStayFinite) {
  const auto options = at::TensorOptions(kernel_device()).dtype(at::kFloat);
  const at::Tensor hidden = leaf(at::full({2, 1}, 1e4, options));
  const at::Tensor weight = leaf(at::tensor({1., -1., 0.5, 0.}, at::kDouble).to(options).view({4, 1}));
  const at::Tensor targets = at::tensor({0, 1}, at::kLong).to(kernel_device());
  const Tensors got = testing::with_kernels([&] {
    const auto [loss, losses] = cross_entropy(hidden, weight, targets, 1);
    Tensors results = testing::gradients({loss}, {hidden, weight}, {at::ones_like(loss)});
    results.push_back(losses);
    return results;
  });
  for (const at::Tensor& t : got) EXPECT_TRUE(t.isfinite().all().item<bool>());
  EXPECT_FLOAT_EQ(got[2][0].item<float>(), 0);
  EXPECT_FLOAT_EQ(got[2][1].item<float>(), 2e4);
}

}  // namespace
}  // namespace oryx::operators
