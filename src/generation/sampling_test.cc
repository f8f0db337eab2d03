#include "generation/sampling.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <cmath>
#include <map>
#include <set>

#include "base/error.h"

namespace oryx::generation {
namespace {

at::Tensor logits_of(std::vector<double> probabilities) {
  return at::tensor(probabilities, at::kDouble).log();
}

// How often each id is drawn over many positions of one sequence.
std::map<int64_t, int64_t> histogram(const at::Tensor& logits, int64_t vocabulary,
                                     const SamplingOptions& options, int64_t draws, uint64_t sequence = 0) {
  std::map<int64_t, int64_t> counts;
  for (int64_t position = 0; position < draws; ++position) {
    ++counts[choose(logits, vocabulary, options, sequence, static_cast<uint64_t>(position)).id];
  }
  return counts;
}

double chi_square(const std::map<int64_t, int64_t>& counts, const std::vector<double>& expected,
                  int64_t draws) {
  double sum = 0;
  for (size_t id = 0; id < expected.size(); ++id) {
    const auto found = counts.find(static_cast<int64_t>(id));
    const double seen = found == counts.end() ? 0 : static_cast<double>(found->second);
    const double wanted = expected[id] * static_cast<double>(draws);
    sum += (seen - wanted) * (seen - wanted) / wanted;
  }
  return sum;
}

TEST(Sampling, DrawsFollowTheDistribution) {
  const std::vector<double> expected = {0.5, 0.25, 0.125, 0.0625, 0.0625};
  const auto counts = histogram(logits_of(expected), 5, {.temperature = 1.0, .seed = 3}, 20000);
  // The 99.99 % point of chi-square with four degrees of freedom.
  EXPECT_LT(chi_square(counts, expected, 20000), 23.5);
}

TEST(Sampling, SequencesDrawIndependently) {
  const at::Tensor logits = logits_of({0.5, 0.5});
  const SamplingOptions options{.temperature = 1.0, .seed = 9};
  int64_t equal = 0;
  for (uint64_t position = 0; position < 4000; ++position) {
    equal += choose(logits, 2, options, 0, position).id == choose(logits, 2, options, 1, position).id;
  }
  EXPECT_NEAR(static_cast<double>(equal), 2000, 150);
}

TEST(Sampling, TemperatureSharpens) {
  // At temperature 1/2 the probabilities are squared: 0.8 : 0.2 becomes 16 : 1.
  const auto counts = histogram(logits_of({0.8, 0.2}), 2, {.temperature = 0.5, .seed = 1}, 20000);
  EXPECT_LT(chi_square(counts, {16.0 / 17, 1.0 / 17}, 20000), 15.1);
  const auto cold = histogram(logits_of({0.4, 0.6}), 2, {.temperature = 1e-12}, 50);
  EXPECT_EQ(cold.at(1), 50);
}

TEST(Sampling, TopKThenTopP) {
  const std::vector<double> p = {0.1, 0.4, 0.3, 0.2};
  const auto two = histogram(logits_of(p), 4, {.temperature = 1.0, .top_k = 2}, 8000);
  EXPECT_EQ(two.size(), 2u);
  EXPECT_NEAR(static_cast<double>(two.at(1)) / 8000, 4.0 / 7, 0.03);
  // 0.4 alone falls short of 0.41; with 0.3 it reaches it.
  EXPECT_EQ(histogram(logits_of(p), 4, {.temperature = 1.0, .top_p = 0.41}, 2000).size(), 2u);
  EXPECT_EQ(histogram(logits_of(p), 4, {.temperature = 1.0, .top_p = 0.39}, 500).size(), 1u);
  // Top-p counts the share of what top-k left: 4/7 of the two reach 0.5.
  EXPECT_EQ(histogram(logits_of(p), 4, {.temperature = 1.0, .top_k = 2, .top_p = 0.5}, 500).size(), 1u);
  EXPECT_EQ(histogram(logits_of(p), 4, {.temperature = 1.0, .top_k = 100}, 8000).size(), 4u);
  EXPECT_EQ(histogram(logits_of(p), 4, {.temperature = 1.0, .top_k = 1}, 100).at(1), 100);
  EXPECT_EQ(histogram(logits_of(p), 4, {.temperature = 1.0, .top_p = 1e-300}, 100).at(1), 100);
}

TEST(Sampling, GreedyTakesTheLowestOfEqualIds) {
  EXPECT_EQ(choose(at::tensor({1.f, 5.f, 5.f, 2.f}), 4, {}, 0, 0).id, 1);
  EXPECT_EQ(choose(at::zeros({50304}, at::kBFloat16), 50257, {}, 0, 0).id, 0);
}

TEST(Sampling, PaddingIsNeverChosenButCountsInLogprob) {
  at::Tensor logits = at::zeros({8});
  logits.narrow(0, 6, 2).fill_(50.0);
  const Choice greedy = choose(logits, 6, {}, 0, 0);
  EXPECT_LT(greedy.id, 6);
  EXPECT_NEAR(greedy.logprob, -50 - std::log(2.0), 1e-5);
  for (const auto& [id, count] : histogram(logits, 6, {.temperature = 1.0}, 500)) EXPECT_LT(id, 6);
}

TEST(Sampling, AnyOptionsKeepThePromisedSet) {
  EXPECT_TRUE(rc::check([] {
    const auto size = *rc::gen::inRange<int64_t>(1, 40);
    std::vector<double> values;
    for (int64_t i = 0; i < size; ++i) values.push_back(*rc::gen::inRange(-40, 40) / 8.0);
    const at::Tensor logits = at::tensor(values, at::kDouble);
    const SamplingOptions options{.temperature = *rc::gen::inRange(1, 30) / 10.0,
                                  .top_k = *rc::gen::inRange<int64_t>(0, 50),
                                  .top_p = *rc::gen::inRange(1, 101) / 100.0,
                                  .seed = *rc::gen::arbitrary<uint64_t>()};
    const auto position = *rc::gen::arbitrary<uint64_t>();
    const Choice choice = choose(logits, size, options, 5, position);
    RC_ASSERT(choice.id == choose(logits, size, options, 5, position).id);

    // Its rank is within top-k, and the probability of all that rank above it does not already reach top-p.
    const at::Tensor p = at::softmax(logits / options.temperature, 0);
    const at::Tensor sorted = std::get<0>(p.sort(0, true));
    const int64_t kept = options.top_k == 0 ? size : std::min(size, options.top_k);
    const double chosen = p[choice.id].item<double>();
    const int64_t above = (p > chosen).sum().item<int64_t>();
    RC_ASSERT(above < kept);
    if (above > 0) {
      const double share =
          (sorted.narrow(0, 0, above).sum() / sorted.narrow(0, 0, kept).sum()).item<double>();
      RC_ASSERT(options.top_p == 1.0 || share < options.top_p + 1e-12);
    }
  }));
}

TEST(Sampling, RefusesBadOptionsAndNumbers) {
  EXPECT_THROW(validate({.temperature = -0.1}), UsageError);
  EXPECT_THROW(validate({.temperature = std::nan("")}), UsageError);
  EXPECT_THROW(validate({.top_k = -1}), UsageError);
  EXPECT_THROW(validate({.top_p = 0}), UsageError);
  EXPECT_THROW(validate({.top_p = 1.5}), UsageError);
  EXPECT_NO_THROW(validate({}));
  EXPECT_THROW(choose(at::full({4}, std::nan("")), 4, {}, 0, 7), Error);
  EXPECT_THROW(choose(at::zeros({4}), 5, {}, 0, 0), Error);
}

}  // namespace
}  // namespace oryx::generation
