#include "operators/adamw/adamw.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::random_normal;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;

struct Model {
  Tensors parameters, first_moments, second_moments;
};

const std::vector<std::vector<int64_t>> shapes = {{3, 5}, {1}, {20000}, {64, 33}, {0}, {70000}};

Model make_model(at::ScalarType dtype) {
  Model model;
  for (const auto& sizes : shapes) {
    model.parameters.push_back(random_normal(sizes, dtype));
    model.first_moments.push_back(at::zeros(sizes, dtype));
    model.second_moments.push_back(at::zeros(sizes, dtype));
  }
  return model;
}

Model copy(const Model& model) {
  Model result;
  for (auto member : {&Model::parameters, &Model::first_moments, &Model::second_moments})
    for (const at::Tensor& t : model.*member) (result.*member).push_back(t.clone());
  return result;
}

Tensors make_gradients(at::ScalarType dtype, int step) {
  Tensors gradients;
  for (const auto& sizes : shapes) gradients.push_back(random_normal(sizes, dtype));
  gradients[step % gradients.size()] = at::Tensor();  // a parameter that this step did not use
  return gradients;
}

AdamwOptions make_options(int64_t step) {
  return {.learning_rate = 1e-2,
          .beta1 = 0.9,
          .beta2 = 0.95,
          .eps = 1e-8,
          .weight_decay = {0.1, 0, 0.1, 0.05, 0, 0.1},
          .step = step,
          .gradient_scale = 0.3};
}

TEST(Adamw, MatchesReferenceOverSteps) {
  at::manual_seed(1);
  for (const auto& [dtype, tolerance] : {std::pair{at::kDouble, 1e-14}, {at::kFloat, 1e-6}}) {
    Model ours = make_model(dtype), reference = copy(ours);
    for (int step = 1; step <= 12; ++step) {
      const Tensors gradients = make_gradients(dtype, step);
      adamw_step(ours.parameters, gradients, ours.first_moments, ours.second_moments, make_options(step));
      adamw_step_reference(reference.parameters, gradients, reference.first_moments, reference.second_moments,
                           make_options(step));
    }
    for (size_t i = 0; i < shapes.size(); ++i) {
      EXPECT_LE(relative_error(ours.parameters[i], reference.parameters[i]), tolerance);
      EXPECT_LE(relative_error(ours.first_moments[i], reference.first_moments[i]), tolerance);
      EXPECT_LE(relative_error(ours.second_moments[i], reference.second_moments[i]), tolerance);
    }
  }
}

TEST(Adamw, FollowsTheFormulaByHand) {
  const at::Tensor p = at::full({1}, 2., at::kDouble), g = at::full({1}, 0.5, at::kDouble);
  const at::Tensor m = at::zeros({1}, at::kDouble), v = at::zeros({1}, at::kDouble);
  double want = 2, first = 0, second = 0;
  for (int step = 1; step <= 3; ++step) {
    adamw_step({p}, {g}, {m}, {v}, {0.1, 0.9, 0.99, 1e-8, {0.2}, step, 2});
    want *= 1 - 0.1 * 0.2;
    first = 0.9 * first + 0.1 * 1;
    second = 0.99 * second + 0.01 * 1;
    want -=
        0.1 * (first / (1 - std::pow(0.9, step))) / (std::sqrt(second / (1 - std::pow(0.99, step))) + 1e-8);
    EXPECT_NEAR(p.item<double>(), want, 1e-14);
  }
}

TEST(Adamw, UndefinedGradientIsZero) {
  at::manual_seed(2);
  Model with_zero = make_model(at::kFloat), with_none = copy(with_zero);
  Tensors zeros, none(shapes.size());
  for (const auto& sizes : shapes) zeros.push_back(at::zeros(sizes));
  for (int step = 1; step <= 3; ++step) {
    const Tensors gradients = make_gradients(at::kFloat, step);
    adamw_step(with_zero.parameters, step == 1 ? gradients : zeros, with_zero.first_moments,
               with_zero.second_moments, make_options(step));
    adamw_step(with_none.parameters, step == 1 ? gradients : none, with_none.first_moments,
               with_none.second_moments, make_options(step));
  }
  for (size_t i = 0; i < shapes.size(); ++i)
    EXPECT_TRUE(at::equal(with_zero.parameters[i], with_none.parameters[i]));
}

TEST(Adamw, DoesNotDependOnThreads) {
  at::manual_seed(3);
  const int threads = at::get_num_threads();
  Model models[2] = {make_model(at::kFloat), {}};
  models[1] = copy(models[0]);
  const Tensors gradients = make_gradients(at::kFloat, 1);
  double norms[2];
  for (int run : {0, 1}) {
    at::set_num_threads(run + 1);
    norms[run] = global_norm(gradients);
    adamw_step(models[run].parameters, gradients, models[run].first_moments, models[run].second_moments,
               make_options(1));
  }
  at::set_num_threads(threads);
  EXPECT_EQ(norms[0], norms[1]);
  for (size_t i = 0; i < shapes.size(); ++i)
    EXPECT_TRUE(at::equal(models[0].parameters[i], models[1].parameters[i]));
}

TEST(GlobalNorm, MatchesReference) {
  at::manual_seed(4);
  for (at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const Tensors gradients = make_gradients(dtype, 1);
    EXPECT_NEAR(global_norm(gradients) / global_norm_reference(gradients), 1, 1e-13);
  }
  EXPECT_EQ(global_norm({}), 0);
  EXPECT_TRUE(std::isnan(global_norm({at::full({3}, NAN)})));
}

TEST(Adamw, RejectsWhatItCannotRead) {
  const at::Tensor p = at::ones({4, 2}), other = at::ones({2, 4});
  const auto step = [](const Tensors& parameters, const Tensors& gradients, const Tensors& moments,
                       const AdamwOptions& options) {
    adamw_step(parameters, gradients, moments, moments, options);
  };
  EXPECT_THROW(step({p}, {other}, {p.clone()}, {}), Error);
  EXPECT_THROW(step({p}, {p}, {other}, {}), Error);
  EXPECT_THROW(step({p}, {p}, {at::Tensor()}, {}), Error);
  EXPECT_THROW(step({p}, {}, {p}, {}), Error);
  EXPECT_THROW(step({p.t()}, {p.t()}, {p.t()}, {}), Error);
  EXPECT_THROW(step({p.to(at::kBFloat16)}, {p}, {p}, {}), Error);
  EXPECT_THROW(step({p}, {p}, {p.clone()}, {.weight_decay = {1, 2}}), Error);
  EXPECT_THROW(step({p}, {p}, {p.clone()}, {.weight_decay = {}, .step = 0}), Error);
}

}  // namespace
}  // namespace oryx::operators
