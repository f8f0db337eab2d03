#include "operators/adamw/adamw.h"
#include "operators/device/device_testing.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::kernel_device;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;

[[maybe_unused]] const bool is_poisoned = testing::poison_fresh_memory();

// More tensors than one launch takes, empty ones, several blocks, and one that 16-byte accesses cannot reach.
Tensors make_tensors(at::ScalarType dtype) {
  const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
  Tensors tensors;
  for (int i = 0; i < 70; ++i) tensors.push_back(at::randn({i % 7, 3}, options));
  tensors.push_back(at::randn({testing::wants_small_cases() ? 20001 : 20000003}, options));
  tensors.push_back(at::randn({1001}, options).narrow(0, 1, 1000));
  tensors.push_back(at::randn({64, 33}, options));
  return tensors;
}

TEST(AdamwKernels, MatchReferenceOverSteps) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    at::manual_seed(1);
    const double tolerance = dtype == at::kDouble ? 1e-12 : 1e-6;
    const Tensors start = make_tensors(dtype);
    Tensors gradients[2] = {make_tensors(dtype), make_tensors(dtype)};
    gradients[0][5] = gradients[1][70] = at::Tensor();
    const at::Tensor scale = at::full({}, 0.7, start[0].options().dtype(at::kDouble));
    const auto run = [&](auto step_function) {
      Tensors p, m, v;
      for (const at::Tensor& t : start) {
        // Written in place, so that the misaligned one stays so.
        p.push_back(at::cat({at::zeros({1}, t.options()), t.flatten()})
                        .narrow(0, t.numel() == 1000 ? 1 : 0, t.numel()));
        if (t.numel() != 1000) p.back().copy_(t.flatten());
        m.push_back(at::zeros_like(p.back()));
        v.push_back(at::zeros_like(p.back()));
      }
      AdamwOptions options{.learning_rate = 1e-2, .gradient_scale = 0.3, .gradient_scale_tensor = scale};
      for (size_t i = 0; i < p.size(); ++i) options.weight_decay.push_back(i % 3 == 0 ? 0.1 : 0);
      for (int step = 1; step <= 4; ++step) {
        options.step = step;
        Tensors flat;
        for (const at::Tensor& g : gradients[step % 2]) flat.push_back(g.defined() ? g.flatten() : g);
        step_function(p, flat, m, v, options);
      }
      Tensors results = p;
      results.insert(results.end(), m.begin(), m.end());
      results.insert(results.end(), v.begin(), v.end());
      return results;
    };
    const Tensors got = testing::with_kernels([&] { return run(adamw_step); });
    const Tensors want = run(adamw_step_reference);
    for (size_t i = 0; i < got.size(); ++i)
      EXPECT_LE(relative_error(got[i], want[i]), tolerance) << "tensor " << i;
  }
}

TEST(AdamwKernels, NormMatchesReference) {
  at::manual_seed(2);
  Tensors gradients;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble})
    for (const at::Tensor& t : make_tensors(dtype)) gradients.push_back(t);
  gradients[3] = at::Tensor();
  const Tensors got = testing::with_kernels([&] {
    const at::Tensor norm = global_norm_device(gradients);
    EXPECT_EQ(norm.item<double>(), global_norm(gradients));
    return Tensors{norm};
  });
  EXPECT_EQ(got[0].scalar_type(), at::kDouble);
  EXPECT_NEAR(got[0].item<double>() / global_norm_reference(gradients), 1, 1e-12);
  testing::with_kernels([&] {
    const Tensors none = {at::Tensor(), at::zeros({0}, at::TensorOptions(kernel_device()))};
    EXPECT_EQ(global_norm(none), 0);
    return Tensors{none[1]};
  });
}

}  // namespace
}  // namespace oryx::operators
