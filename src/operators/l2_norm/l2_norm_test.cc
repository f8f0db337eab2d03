#include "operators/l2_norm/l2_norm.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::gradients;
using testing::leaves;
using testing::random_normal;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;

TEST(L2Norm, MatchesReference) {
  at::manual_seed(1);
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{
           {2, 65, 3, 64}, {129, 128}, {3, 5, 37}, {1, 1, 1, 2}, {16}, {0, 4, 8}, {4, 0, 8}}) {
    for (const auto& [dtype, tolerance] :
         {std::pair{at::kDouble, 1e-13}, {at::kFloat, 1e-6}, {at::kBFloat16, 5e-3}}) {
      const Tensors given = leaves({random_normal(sizes)}, dtype), truth = leaves(given, at::kDouble);
      const at::Tensor y = l2_norm(given[0]), want = l2_norm_reference(truth[0]);
      EXPECT_EQ(y.scalar_type(), dtype);
      EXPECT_EQ(y.sizes(), given[0].sizes());
      EXPECT_LE(relative_error(y.detach(), want.detach()), tolerance);
      const at::Tensor dy = random_normal(sizes, dtype);
      EXPECT_LE(
          relative_error(gradients({y}, given, {dy})[0], gradients({want}, truth, {dy.to(at::kDouble)})[0]),
          tolerance);
      c10::NoGradGuard no_grad;
      EXPECT_TRUE(at::equal(l2_norm(given[0]), y));
    }
  }
}

TEST(L2Norm, GradientsMatchFiniteDifferences) {
  at::manual_seed(2);
  EXPECT_LE(testing::directional_error([](const Tensors& t) { return Tensors{l2_norm(t[0], 0.1)}; },
                                       {random_normal({2, 5, 3, 19})}),
            1e-6);
}

TEST(L2Norm, ReadsViews) {
  at::manual_seed(3);
  const at::Tensor fused = random_normal({2, 9, 6, 16}, at::kFloat), keys = fused.slice(2, 2, 4);
  EXPECT_TRUE(at::equal(l2_norm(keys), l2_norm(keys.contiguous())));
  EXPECT_TRUE(at::equal(l2_norm(keys.transpose(1, 2)), l2_norm(keys).transpose(1, 2)));
  EXPECT_TRUE(at::equal(l2_norm(keys.transpose(2, 3)), l2_norm(keys.transpose(2, 3).contiguous())));
}

TEST(L2Norm, ZeroVectorsStayFinite) {
  for (at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const at::Tensor x = at::zeros({3, 20}, dtype).set_requires_grad(true);
    const at::Tensor y = l2_norm(x), dx = gradients({y}, {x}, {at::ones_like(y)})[0];
    EXPECT_EQ(y.abs().max().item<double>(), 0);
    // The slope at zero is 1 / sqrt(eps).
    EXPECT_NEAR(dx.max().item<double>(), 1000, 5);
  }
}

TEST(L2Norm, RejectsWhatItCannotRead) {
  EXPECT_THROW(l2_norm(at::ones({3, 4}, at::kInt)), Error);
  EXPECT_THROW(l2_norm(at::ones({3, 0})), Error);
}

}  // namespace
}  // namespace oryx::operators
