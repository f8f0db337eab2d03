#include <fmt/format.h>

#include "operators/device/device_testing.h"
#include "operators/l2_norm/l2_norm.h"
#include "operators/prepare_heads/prepare_heads.h"
#include "operators/rotary/rotary.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::kernel_device;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;

[[maybe_unused]] const bool is_poisoned = testing::poison_fresh_memory();

struct Case {
  int64_t batch, time, heads, dim;
  int64_t padding = 0;  // heads after those of x in the fused projection
  bool on_gpu_only = false;
};

const Case cases[] = {
    {2, 9, 3, 64, 2},        {1, 37, 2, 128}, {2, 5, 2, 16, 1}, {1, 7, 3, 256},  {2, 3, 2, 96},
    {1, 3, 2, 6, 1},         {1, 1, 1, 2},    {1, 0, 2, 64},    {2, 3, 2, 1024}, {8, 2048, 16, 128, 32, true},
    {3, 333, 8, 64, 0, true}};

at::Tensor leaf(const at::Tensor& t) { return t.detach().set_requires_grad(true); }

at::Tensor make_heads(const Case& c, at::TensorOptions options) {
  const at::Tensor fused = at::full({c.batch, c.time, c.heads + c.padding, c.dim}, NAN, options);
  fused.narrow(2, 0, c.heads).normal_();
  return leaf(fused.narrow(2, 0, c.heads));
}

std::string name(const Case& c, int steps, at::ScalarType dtype) {
  return fmt::format("{} x {} x {} x {}, steps {}, {}", c.batch, c.time, c.heads, c.dim, steps,
                     at::toString(dtype));
}

double tolerance(at::ScalarType dtype) {
  return dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-6 : 5e-3;
}

// Of the gradient of l2_norm() alone, relative to the part of it that the projection onto the sphere takes
// from: it is computed from the rounded result, and where dy points along x little but that rounding is left.
double l2_gradient_error(const at::Tensor& got, const at::Tensor& want, const at::Tensor& x,
                         const at::Tensor& dy, double eps) {
  const at::Tensor scaled = dy * at::rsqrt(x.square().sum(-1, /*keepdim=*/true) + eps);
  return at::linalg_vector_norm(got.to(at::kDouble) - want).item<double>() /
         std::max(at::linalg_vector_norm(scaled).item<double>(), 1e-300);
}

TEST(PrepareHeadsKernels, MatchReference) {
  at::manual_seed(1);
  for (const Case& c : cases) {
    if (testing::wants_small_cases() && c.on_gpu_only) continue;
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      if (c.on_gpu_only && dtype != at::kBFloat16) continue;
      const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
      const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
      const at::Tensor x = make_heads(c, options), dy = at::randn(x.sizes(), options);
      const auto [cosine, sine] =
          rotary_tables(at::arange(5, 5 + c.time, options.dtype(at::kLong)), c.dim, 10000, wide);
      for (int steps = 1; steps < 8; ++steps) {
        HeadSteps given{.silu = (steps & 4) != 0, .l2_norm = (steps & 2) != 0}, exact = given;
        if (steps & 1) {
          given.cosine = cosine, given.sine = sine;
          exact.cosine = cosine.to(at::kDouble), exact.sine = sine.to(at::kDouble);
        }
        const Tensors got = testing::with_kernels([&] {
          const at::Tensor y = prepare_heads(x, given);
          EXPECT_TRUE(y.is_contiguous());
          Tensors results = testing::gradients({y}, {x}, {dy});
          c10::NoGradGuard no_grad;
          EXPECT_TRUE(at::equal(prepare_heads(x, given), y));
          results.push_back(y.detach());
          return results;
        });
        const at::Tensor truth = leaf(x.to(at::kDouble)), want = prepare_heads_reference(truth, exact);
        EXPECT_LE(relative_error(got[1], want.detach()), tolerance(dtype)) << name(c, steps, dtype);
        const at::Tensor wide_dy = dy.to(at::kDouble),
                         gradient = testing::gradients({want}, {truth}, {wide_dy})[0];
        const double error = steps == 2 ? l2_gradient_error(got[0], gradient, truth, wide_dy, exact.eps)
                                        : relative_error(got[0], gradient);
        EXPECT_LE(error, tolerance(dtype)) << name(c, steps, dtype);
      }
    }
  }
}

// The operators of one step each, with a strided gradient for the rotation, and one of two readers.
TEST(PrepareHeadsKernels, ServeL2NormAndRotary) {
  at::manual_seed(2);
  for (const Case& c : cases) {
    if (testing::wants_small_cases() && c.on_gpu_only) continue;
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      if (c.on_gpu_only && dtype != at::kBFloat16) continue;
      const auto options = at::TensorOptions(kernel_device()).dtype(dtype);
      const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
      const at::Tensor x = make_heads(c, options), dy = make_heads(c, options).detach(),
                       dy_again = at::randn(x.sizes(), options);
      const at::Tensor truth = leaf(x.to(at::kDouble)), wide_dy = dy.to(at::kDouble);
      const auto [cosine, sine] =
          rotary_tables(at::arange(c.time, options.dtype(at::kLong)), c.dim, 10000, wide);
      const Tensors got = testing::with_kernels([&] {
        const at::Tensor normed = l2_norm(x, 1e-3), turned = rotary(x, cosine, sine);
        Tensors results = testing::gradients({normed}, {x}, {dy});
        results.push_back(testing::gradients({turned}, {x}, {dy})[0]);
        results.push_back(normed.detach());
        results.push_back(turned.detach());
        const auto [first, second] = rotary_for_two(x, cosine, sine);
        results.push_back(testing::gradients({first, second}, {x}, {dy, dy_again})[0]);
        results.push_back(second.detach());
        return results;
      });
      const at::Tensor normed = l2_norm_reference(truth, 1e-3),
                       turned = rotary_reference(truth, cosine.to(at::kDouble), sine.to(at::kDouble));
      const Tensors want = {
          testing::gradients({normed}, {truth}, {wide_dy})[0],
          testing::gradients({turned}, {truth}, {wide_dy})[0],
          normed.detach(),
          turned.detach(),
          testing::gradients({rotary_reference(truth, cosine.to(at::kDouble), sine.to(at::kDouble))}, {truth},
                             {wide_dy + dy_again.to(at::kDouble)})[0],
          turned.detach()};
      EXPECT_LE(l2_gradient_error(got[0], want[0], truth, wide_dy, 1e-3), tolerance(dtype))
          << name(c, 0, dtype);
      for (size_t i = 1; i < got.size(); ++i)
        EXPECT_LE(relative_error(got[i], want[i]), tolerance(dtype)) << i << " of " << name(c, 0, dtype);
    }
  }
}

TEST(PrepareHeadsKernels, ZeroVectorsStayFinite) {
  const at::Tensor x =
      leaf(at::zeros({1, 2, 3, 64}, at::TensorOptions(kernel_device()).dtype(at::kBFloat16)));
  const Tensors got = testing::with_kernels([&] {
    const at::Tensor y = prepare_heads(x, {.silu = true, .l2_norm = true});
    return Tensors{y.detach(), testing::gradients({y}, {x}, {at::ones_like(y)})[0]};
  });
  EXPECT_EQ(got[0].abs().max().item<double>(), 0);
  EXPECT_TRUE(got[1].isfinite().all().item<bool>());
}

}  // namespace
}  // namespace oryx::operators
