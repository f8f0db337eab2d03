#include "training/optimizer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

namespace oryx::training {
namespace {

TEST(LearningRate, WarmUpAndCosine) {
  const LearningRate rate{2.0, 0.5, 0.3, 15};  // w = ⌊4.5⌋ = 4
  EXPECT_DOUBLE_EQ(rate.at(0), 0.5);
  EXPECT_DOUBLE_EQ(rate.at(3), 2.0);
  EXPECT_DOUBLE_EQ(rate.at(4), 2.0);
  EXPECT_DOUBLE_EQ(rate.at(14), 0.5 + 1.5 * 0.5 * (1 + std::cos(M_PI * 10 / 11)));
}

TEST(LearningRate, NoWarmUpAndNothingButWarmUp) {
  EXPECT_DOUBLE_EQ((LearningRate{1.0, 0.0, 0.0, 10}.at(0)), 1.0);
  EXPECT_DOUBLE_EQ((LearningRate{1.0, 0.0, 1.0, 10}.at(9)), 1.0);
  EXPECT_DOUBLE_EQ((LearningRate{1.0, 0.0, 0.1, 1}.at(0)), 1.0);  // w = 0
}

TEST(Clip, ScalesLongGradientsOnly) {
  EXPECT_EQ(clip_scale(0.5, 1.0), 1.0);
  EXPECT_DOUBLE_EQ(clip_scale(4.0, 1.0), 1.0 / (4.0 + 1e-6));
  EXPECT_EQ(clip_scale(4.0, 0.0), 1.0);
}

// Two tensors, one a matrix and one a vector, under a loss that uses them or not.
class OptimizerTest : public testing::Test {
 protected:
  OptimizerTest() {
    weights_.add("matrix", at::full({2, 3}, 0.5, at::kDouble));
    weights_.add("vector", at::full({3}, 0.5, at::kDouble));
  }
  model::Weights weights_;
};

// AdamW by hand for a constant gradient: after bias correction the step is lr · g/(|g| + eps) each time.
TEST_F(OptimizerTest, UpdatesByTheRule) {
  Optimizer optimizer(weights_, {0.9, 0.95, 0.1});
  double matrix = 0.5, vector = 0.5;
  const double scale = 0.25, gradient = 2 * scale, rate = 0.01;
  for (int64_t step = 0; step < 3; ++step) {
    (2 * weights_.at("matrix").sum() + 2 * weights_.at("vector").sum()).backward();
    EXPECT_NEAR(optimizer.gradient_norm(), 2 * std::sqrt(9.0), 1e-12);
    optimizer.update(step, rate, scale);
    optimizer.clear_gradients();
    EXPECT_FALSE(weights_.at("matrix").grad().defined());
    matrix = matrix * (1 - rate * 0.1) - rate * gradient / (gradient + 1e-8);
    vector = vector - rate * gradient / (gradient + 1e-8);  // no decay
  }
  EXPECT_NEAR(weights_.at("matrix").select(0, 0).select(0, 0).item<double>(), matrix, 1e-12);
  EXPECT_NEAR(weights_.at("vector").select(0, 0).item<double>(), vector, 1e-12);
}

TEST_F(OptimizerTest, AnUnusedParameterKeepsMomentumAndDecay) {
  Optimizer optimizer(weights_, {0.9, 0.95, 0.1});
  weights_.at("matrix").sum().backward();
  optimizer.update(0, 0.01, 1);
  optimizer.clear_gradients();
  const double before = weights_.at("matrix").select(0, 0).select(0, 0).item<double>();
  const double untouched = weights_.at("vector").select(0, 0).item<double>();
  weights_.at("vector").sum().backward();
  optimizer.update(1, 0.01, 1);
  const double m = 0.9 * 0.1 / (1 - 0.81), v = 0.95 * 0.05 / (1 - 0.95 * 0.95);
  EXPECT_NEAR(weights_.at("matrix").select(0, 0).select(0, 0).item<double>(),
              before * (1 - 0.001) - 0.01 * m / (std::sqrt(v) + 1e-8), 1e-12);
  EXPECT_EQ(untouched, 0.5);
  EXPECT_NE(weights_.at("vector").select(0, 0).item<double>(), 0.5);
}

TEST_F(OptimizerTest, MomentsAreNamedAndShared) {
  Optimizer optimizer(weights_, {});
  const auto moments = optimizer.moments();
  ASSERT_EQ(moments.size(), 4u);
  EXPECT_EQ(moments[0].first, "first_moment.matrix");
  EXPECT_EQ(moments[3].first, "second_moment.vector");
  weights_.at("matrix").sum().backward();
  optimizer.update(0, 0.01, 1);
  EXPECT_NEAR(moments[0].second.select(0, 0).select(0, 0).item<double>(), 0.1, 1e-12);
}

}  // namespace
}  // namespace oryx::training
