#include "operators/cross_entropy/cross_entropy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "base/error.h"
#include "operators/testing.h"

namespace oryx::operators {
namespace {

using testing::gradients;
using testing::leaves;
using testing::random_normal;
using testing::relative_error;
using Tensors = std::vector<at::Tensor>;

struct Problem {
  at::Tensor hidden, weight, targets;
};

// A few rows are ignored.
Problem make_problem(int64_t rows, int64_t dim, int64_t vocabulary) {
  Problem p = {random_normal({rows, dim}),
               random_normal({vocabulary, dim}) / std::sqrt(static_cast<double>(dim)),
               at::randint(vocabulary, {rows}, at::kLong)};
  for (int64_t r = 2; r < rows; r += 5) p.targets[r] = -1 - r;
  return p;
}

TEST(CrossEntropy, MatchesReference) {
  at::manual_seed(1);
  for (const auto& [rows, dim, vocabulary] : {std::tuple<int64_t, int64_t, int64_t>{70, 32, 257},
                                              {1, 8, 1},
                                              {9, 5, 16},
                                              {33, 16, 1000},
                                              {0, 4, 10}}) {
    const Problem p = make_problem(rows, dim, vocabulary);
    for (const auto& [dtype, tolerance] : {std::pair{at::kDouble, 1e-13}, {at::kFloat, 1e-6}}) {
      const Tensors truth = leaves(leaves({p.hidden, p.weight}, dtype), at::kDouble);
      const auto [want, want_losses] = cross_entropy_reference(truth[0], truth[1], p.targets, 0.25);
      const Tensors expected = gradients({want}, truth, {at::ones({}, at::kDouble)});
      for (int64_t block : {0, 1, 7, 70, 1000}) {
        const Tensors given = leaves({p.hidden, p.weight}, dtype);
        const auto [loss, losses] = cross_entropy(given[0], given[1], p.targets, 0.25, block);
        EXPECT_EQ(losses.scalar_type(), dtype);
        EXPECT_FALSE(losses.requires_grad());
        EXPECT_LE(relative_error(loss.detach(), want.detach()), tolerance);
        EXPECT_LE(relative_error(losses, want_losses), tolerance);
        const Tensors got = gradients({loss}, given, {at::ones_like(loss)});
        for (int i : {0, 1}) EXPECT_LE(relative_error(got[i], expected[i]), tolerance) << "block " << block;
        c10::NoGradGuard no_grad;
        EXPECT_TRUE(at::equal(std::get<1>(cross_entropy(given[0], given[1], p.targets, 1, block)), losses));
      }
    }
  }
}

TEST(CrossEntropy, MixedPrecisionReturnsTheMastersGradient) {
  at::manual_seed(2);
  const Problem p = make_problem(64, 64, 500);
  const at::Tensor hidden = p.hidden.to(at::kBFloat16).requires_grad_();
  for (at::ScalarType master : {at::kFloat, at::kBFloat16}) {
    const at::Tensor weight = p.weight.to(at::kBFloat16).to(master).requires_grad_();
    const Tensors truth = leaves({hidden, weight}, at::kDouble);
    const auto [want, want_losses] = cross_entropy_reference(truth[0], truth[1], p.targets, 1. / 64);
    const auto [loss, losses] = cross_entropy(hidden, weight, p.targets, 1. / 64, 16);
    EXPECT_EQ(loss.scalar_type(), at::kFloat);
    EXPECT_LE(relative_error(losses, want_losses), 5e-3);
    const Tensors got = gradients({loss}, {hidden, weight}, {at::ones({})});
    const Tensors expected = gradients({want}, truth, {at::ones({}, at::kDouble)});
    EXPECT_EQ(got[0].scalar_type(), at::kBFloat16);
    EXPECT_EQ(got[1].scalar_type(), master);
    for (int i : {0, 1}) EXPECT_LE(relative_error(got[i], expected[i]), 8e-3);
  }
}

TEST(CrossEntropy, ARoundedLeafGetsTheGradientOfItsMaster) {
  at::manual_seed(6);
  const Problem p = make_problem(64, 64, 500);
  const at::Tensor hidden = p.hidden.to(at::kBFloat16), master = p.weight.to(at::kFloat).requires_grad_();
  at::Tensor rounded = master.detach().to(at::kBFloat16).requires_grad_();
  rounded.set_grad_dtype(at::kFloat);
  for (const at::Tensor& weight : {master, rounded}) {
    std::get<0>(cross_entropy(hidden, weight, p.targets, 1. / 64, 16)).backward();
  }
  EXPECT_EQ(rounded.grad().scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(rounded.grad(), master.grad()));
}

TEST(CrossEntropy, GradientsMatchFiniteDifferences) {
  at::manual_seed(3);
  const Problem p = make_problem(21, 9, 40);
  EXPECT_LE(testing::directional_error(
                [&](const Tensors& t) {
                  return Tensors{std::get<0>(cross_entropy(t[0], t[1], p.targets, 0.5, 8))};
                },
                {p.hidden, p.weight}),
            1e-6);
}

TEST(CrossEntropy, UpstreamGradientMultiplies) {
  at::manual_seed(4);
  const Problem p = make_problem(12, 6, 20);
  const Tensors given = leaves({p.hidden, p.weight}, at::kDouble);
  const auto [loss, losses] = cross_entropy(given[0], given[1], p.targets, 1);
  const at::Tensor one = at::ones({}, at::kDouble), three = at::full({}, 3., at::kDouble);
  const Tensors kept = torch::autograd::grad({loss}, given, {one}, /*retain_graph=*/true);
  const Tensors copies = {kept[0].clone(), kept[1].clone()};
  const Tensors tripled = torch::autograd::grad({loss}, given, {three}, /*retain_graph=*/true);
  const Tensors last = gradients({loss}, given, {three});
  EXPECT_THROW(gradients({loss}, given, {three}), Error);
  for (int i : {0, 1}) {
    EXPECT_LE(relative_error(tripled[i], 3 * copies[i]), 1e-15);
    EXPECT_TRUE(at::equal(last[i], tripled[i]));
    EXPECT_TRUE(at::equal(kept[i], copies[i]));
  }
}

TEST(CrossEntropy, OnlyOneInputMayNeedAGradient) {
  at::manual_seed(5);
  const Problem p = make_problem(12, 6, 20);
  const Tensors both = leaves({p.hidden, p.weight}, at::kDouble);
  const Tensors expected = gradients({std::get<0>(cross_entropy(both[0], both[1], p.targets, 1))}, both,
                                     {at::ones({}, at::kDouble)});
  for (int i : {0, 1}) {
    Tensors given = {p.hidden.clone(), p.weight.clone()};
    given[i].set_requires_grad(true);
    const at::Tensor loss = std::get<0>(cross_entropy(given[0], given[1], p.targets, 1));
    EXPECT_TRUE(at::equal(gradients({loss}, {given[i]}, {at::ones({}, at::kDouble)})[0], expected[i]));
  }
}

TEST(CrossEntropy, LargeLogitsStayFinite) {
  const at::Tensor hidden = at::full({2, 1}, 1e4).set_requires_grad(true);
  const at::Tensor weight = at::tensor({1., -1., 0.5}, at::kFloat).view({3, 1}).requires_grad_();
  const auto [loss, losses] = cross_entropy(hidden, weight, at::tensor({0, 1}, at::kLong), 1);
  EXPECT_FLOAT_EQ(losses[0].item<float>(), 0);
  EXPECT_FLOAT_EQ(losses[1].item<float>(), 2e4);
  for (const at::Tensor& g : gradients({loss}, {hidden, weight}, {at::ones({})}))
    EXPECT_TRUE(g.isfinite().all().item<bool>());
}

TEST(CrossEntropy, IgnoredRowsCountNothing) {
  const Tensors given = leaves({at::ones({3, 4}), at::ones({5, 4})}, at::kFloat);
  const auto [loss, losses] = cross_entropy(given[0], given[1], at::full({3}, -100, at::kLong), 1);
  EXPECT_EQ(loss.item<float>(), 0);
  for (const at::Tensor& g : gradients({loss}, given, {at::ones({})}))
    EXPECT_EQ(g.abs().max().item<float>(), 0);
}

TEST(CrossEntropy, NamesATargetBeyondTheVocabulary) {
  const at::Tensor hidden = at::ones({2, 4}), weight = at::ones({5, 4});
  try {
    cross_entropy(hidden, weight, at::tensor({1, 5}, at::kLong), 1);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()), "[cross_entropy] expected targets below the vocabulary of 5, got 5");
  }
  EXPECT_THROW(cross_entropy(hidden, weight, at::tensor({1, 1}, at::kInt), 1), Error);
  EXPECT_THROW(cross_entropy(hidden, at::ones({5, 3}), at::tensor({1, 1}, at::kLong), 1), Error);
  EXPECT_THROW(cross_entropy(hidden, weight.to(at::kDouble), at::tensor({1, 1}, at::kLong), 1), Error);
  EXPECT_THROW(cross_entropy(hidden, weight, at::tensor({1}, at::kLong), 1), Error);
  EXPECT_THROW(cross_entropy(hidden, weight, at::tensor({1, 1}, at::kLong), 1, -1), Error);
}

}  // namespace
}  // namespace oryx::operators
