#include "operators/rotary/rotary.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::gradients;
using testing::leaves;
using testing::random_normal;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;

TEST(RotaryTables, AreRoundedFromDouble) {
  const at::Tensor positions = at::tensor({0, 1, 7, 100000}, at::kLong);
  const auto [cosine, sine] = rotary_tables(positions, 6, 10000, at::kFloat);
  for (int64_t r = 0; r < 4; ++r) {
    for (int64_t i = 0; i < 3; ++i) {
      const double angle = static_cast<double>(positions[r].item<int64_t>()) *
                           std::pow(10000., -2. * static_cast<double>(i) / 6);
      // Within one rounding of float32, whose spacing at 1 is 6e-8; float32 angles would miss by 1e-3 at 1e5.
      EXPECT_NEAR(cosine[r][i].item<double>(), std::cos(angle), 6e-8);
      EXPECT_NEAR(sine[r][i].item<double>(), std::sin(angle), 6e-8);
    }
  }
  EXPECT_EQ(std::get<0>(rotary_tables(positions, 6, 10000, at::kDouble)).scalar_type(), at::kDouble);
  EXPECT_THROW(rotary_tables(positions, 5, 10000, at::kFloat), Error);
  EXPECT_THROW(rotary_tables(positions.to(at::kInt), 6, 10000, at::kFloat), Error);
}

TEST(Rotary, RotatesPairsByTheirAngle) {
  const auto [cosine, sine] = rotary_tables(at::tensor({3}, at::kLong), 4, 100, at::kDouble);
  const at::Tensor x = at::tensor({1., 2., 3., 4.}, at::kDouble).view({1, 1, 4});
  const at::Tensor y = rotary(x, cosine, sine).flatten();
  for (int64_t i = 0; i < 2; ++i) {
    const double angle = 3 * std::pow(100., -static_cast<double>(i) / 2), c = std::cos(angle),
                 s = std::sin(angle);
    const double low = 1. + static_cast<double>(i), high = 3. + static_cast<double>(i);
    EXPECT_NEAR(y[i].item<double>(), low * c - high * s, 1e-14);
    EXPECT_NEAR(y[i + 2].item<double>(), high * c + low * s, 1e-14);
  }
}

TEST(Rotary, MatchesReference) {
  at::manual_seed(1);
  for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{
           {2, 65, 3, 64}, {1, 1, 1, 2}, {3, 64, 2, 34}, {63, 4, 128}, {5, 2, 14}, {0, 2, 8}}) {
    const int64_t dim = sizes.back(), n = sizes.size() == 4 ? sizes[1] : sizes[0];
    for (const auto& [dtype, tolerance] :
         {std::pair{at::kDouble, 1e-13}, {at::kFloat, 1e-6}, {at::kBFloat16, 5e-3}}) {
      const auto table = [&, dim = dim](at::ScalarType type) {
        return rotary_tables(at::arange(5, 5 + n, at::kLong), dim, 10000, type);
      };
      const auto [cosine, sine] = table(dtype == at::kDouble ? at::kDouble : at::kFloat);
      const Tensors given = leaves({random_normal(sizes)}, dtype), truth = leaves(given, at::kDouble);
      const at::Tensor y = rotary(given[0], cosine, sine);
      const at::Tensor want = rotary_reference(truth[0], cosine.to(at::kDouble), sine.to(at::kDouble));
      EXPECT_EQ(y.scalar_type(), dtype);
      EXPECT_LE(relative_error(y.detach(), want.detach()), tolerance);
      const at::Tensor dy = random_normal(sizes, dtype);
      EXPECT_LE(
          relative_error(gradients({y}, given, {dy})[0], gradients({want}, truth, {dy.to(at::kDouble)})[0]),
          tolerance);
    }
  }
}

TEST(Rotary, ReadsViewsAndRepeatsTheTable) {
  at::manual_seed(2);
  const at::Tensor fused = random_normal({2, 9, 6, 16}, at::kFloat);
  const auto [cosine, sine] = rotary_tables(at::arange(9, at::kLong), 16, 10000, at::kFloat);
  const at::Tensor keys = fused.slice(2, 2, 4);
  const at::Tensor y = rotary(keys, cosine, sine);
  EXPECT_TRUE(y.is_contiguous());
  EXPECT_TRUE(at::equal(y, rotary(keys.contiguous(), cosine, sine)));
  EXPECT_TRUE(at::equal(y.flatten(0, 1), rotary(keys.flatten(0, 1), cosine, sine)));
  EXPECT_TRUE(at::equal(y[1], rotary(keys[1], cosine, sine)));
  EXPECT_TRUE(
      at::equal(rotary(keys.transpose(0, 1).slice(0, 0, 1), cosine.slice(0, 0, 1), sine.slice(0, 0, 1)),
                y.transpose(0, 1).slice(0, 0, 1)));
}

TEST(Rotary, GradientsMatchFiniteDifferences) {
  at::manual_seed(3);
  const auto [cosine, sine] = rotary_tables(at::arange(7, at::kLong), 10, 10000, at::kDouble);
  EXPECT_LE(testing::directional_error(
                [&, c = cosine, s = sine](const Tensors& t) { return Tensors{rotary(t[0], c, s)}; },
                {random_normal({2, 7, 3, 10})}),
            1e-6);
}

TEST(Rotary, TwoReadersFlowBackTogether) {
  at::manual_seed(4);
  const auto [cosine, sine] = rotary_tables(at::arange(7, at::kLong), 10, 10000, at::kDouble);
  const Tensors x = leaves({random_normal({2, 7, 3, 10})}, at::kDouble);
  const at::Tensor dy = random_normal(x[0].sizes()), dy_again = random_normal(x[0].sizes());
  const auto gradient = [&, c = cosine, s = sine](const Tensors& cotangents) {
    const auto [first, second] = rotary_for_two(x[0], c, s);
    EXPECT_TRUE(at::equal(first, second));
    if (cotangents.size() == 1) return gradients({second}, x, cotangents)[0];
    return gradients({first, second}, x, cotangents)[0];
  };
  const at::Tensor y = rotary(x[0], cosine, sine);
  EXPECT_TRUE(at::equal(gradient({dy, dy_again}), gradients({y}, x, {dy + dy_again})[0]));
  EXPECT_TRUE(at::equal(gradient({dy}), gradients({rotary(x[0], cosine, sine)}, x, {dy})[0]));
}

TEST(Rotary, RejectsWhatItCannotRead) {
  const auto [cosine, sine] = rotary_tables(at::arange(4, at::kLong), 8, 10000, at::kFloat);
  EXPECT_THROW(rotary(at::ones({4, 8}), cosine, sine), Error);
  EXPECT_THROW(rotary(at::ones({4, 1, 6}), cosine, sine), Error);
  EXPECT_THROW(rotary(at::ones({5, 1, 8}), cosine, sine), Error);
  EXPECT_THROW(rotary(at::ones({4, 1, 8}, at::kDouble), cosine, sine), Error);
}

}  // namespace
}  // namespace oryx::operators
