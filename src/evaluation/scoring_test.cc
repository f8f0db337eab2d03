#include "evaluation/scoring.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "base/error.h"
#include "evaluation/batching.h"
#include "model/testing.h"

namespace oryx::evaluation {
namespace {

using model::testing::random_config;
using model::testing::random_model;
using model::testing::random_spans;
using model::testing::small_config;

constexpr double kTolerance = 1e-5;

// Items of one to four sequences that begin alike.
std::vector<Item> random_items(const model::ModelConfig& config, std::mt19937& dice, int count) {
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(dice);
  };
  const auto extend = [&](std::vector<int64_t> tokens, int64_t by) {
    for (int64_t i = 0; i < by; ++i) tokens.push_back(draw(0, config.vocabulary - 1));
    return tokens;
  };
  std::vector<Item> items;
  for (int i = 0; i < count; ++i) {
    Item item;
    const std::vector<int64_t> context = extend({}, draw(1, 30));
    const schedule::ModeSpans modes = random_spans(config, 64);
    for (int64_t choices = draw(1, 4); choices > 0; --choices) {
      Sequence sequence{extend(context, draw(1, 12)), static_cast<int64_t>(context.size()), {}};
      const auto size = static_cast<int64_t>(sequence.tokens.size());
      // One schedule for all, or one that depends on the sequence.
      sequence.modes = i % 2 == 0 ? schedule::cut(modes, 0, size) : random_spans(config, size);
      item.push_back(std::move(sequence));
    }
    items.push_back(std::move(item));
  }
  return items;
}

std::vector<double> direct(const model::LanguageModel& model, const Sequence& sequence) {
  const auto size = static_cast<int64_t>(sequence.tokens.size());
  const at::Tensor tokens = at::tensor(sequence.tokens, at::kLong).unsqueeze(0);
  const at::Tensor logits = model.logits(model.hidden(tokens, {sequence.modes})).log_softmax(-1);
  std::vector<double> values;
  for (int64_t t = sequence.first; t < size; ++t) {
    values.push_back(logits[t - 1][sequence.tokens[static_cast<size_t>(t)]].item<double>());
  }
  return values;
}

TEST(Scoring, EqualsTheLogitsInAnyBatchAndOrder) {
  rc::check([] {
    const model::ModelConfig config = random_config();
    const auto model = random_model(config, at::kDouble, 3);
    std::mt19937 dice(*rc::gen::arbitrary<uint32_t>());
    std::vector<Item> items = random_items(config, dice, 7);
    const int64_t batch_tokens = *rc::gen::element<int64_t>(1, 100, 100000);
    const bool share = *rc::gen::arbitrary<bool>();
    const auto scores =
        score(model, items, {.batch_tokens = batch_tokens, .greedy = true, .share_prefixes = share});
    for (size_t i = 0; i < items.size(); ++i) {
      for (size_t s = 0; s < items[i].size(); ++s) {
        const std::vector<double> wanted = direct(model, items[i][s]);
        const SequenceScore& got = scores->items[i][s];
        RC_ASSERT(got.log_likelihoods.size() == wanted.size());
        RC_ASSERT(got.is_greedy.size() == wanted.size());
        for (size_t t = 0; t < wanted.size(); ++t) {
          RC_ASSERT(std::abs(got.log_likelihoods[t] - wanted[t]) < kTolerance);
        }
      }
    }
  });
}

TEST(Scoring, OrderDoesNotChangeABit) {
  const auto model = random_model(small_config("ssd", 2), at::kFloat, 5);
  std::mt19937 dice(1);
  std::vector<Item> items;
  for (int i = 0; i < 20; ++i) {
    Item item;
    for (int s = 0; s < 2; ++s) {
      Sequence sequence{{}, 5, {}};
      for (int t = 0; t < 5 + i % 6 + s; ++t) {
        sequence.tokens.push_back(t < 5 ? (7 * i + t) % 40 : std::uniform_int_distribution<>(0, 39)(dice));
      }
      sequence.tokens.push_back(s);
      const auto size = static_cast<int64_t>(sequence.tokens.size());
      sequence.modes = {{0, 3, schedule::Mode::linear}, {3, size, schedule::Mode::attention}};
      item.push_back(std::move(sequence));
    }
    items.push_back(std::move(item));
  }
  const auto before = score(model, items, {.batch_tokens = 64});
  std::vector<size_t> order(items.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), dice);
  std::vector<Item> shuffled;
  for (const size_t i : order) shuffled.push_back(items[i]);
  const auto after = score(model, shuffled, {.batch_tokens = 64});
  for (size_t i = 0; i < order.size(); ++i) {
    for (size_t s = 0; s < 2; ++s) {
      EXPECT_EQ(after->items[i][s].log_likelihoods, before->items[order[i]][s].log_likelihoods);
    }
  }
  EXPECT_EQ(before->tokens_run, after->tokens_run);
}

Sequence sequence_of(std::vector<int64_t> tokens, int64_t first, int64_t switch_at) {
  const auto size = static_cast<int64_t>(tokens.size());
  return {std::move(tokens), first,
          schedule::merge(
              {{0, switch_at, schedule::Mode::linear}, {switch_at, size, schedule::Mode::attention}})};
}

TEST(Batching, SharesWhatTokensAndModesAgreeOn) {
  const std::vector<int64_t> context{1, 2, 3, 4, 5, 6};
  const auto with = [&](std::vector<int64_t> rest) {
    std::vector<int64_t> tokens = context;
    tokens.insert(tokens.end(), rest.begin(), rest.end());
    return tokens;
  };
  EXPECT_EQ(shared_prefix({sequence_of(with({7}), 6, 6), sequence_of(with({8, 9}), 6, 6)}), 5);
  EXPECT_EQ(shared_prefix({sequence_of(with({7}), 6, 3), sequence_of(with({8, 9}), 6, 4)}), 3);
  EXPECT_EQ(shared_prefix({sequence_of({1, 2, 3, 4}, 3, 4), sequence_of({1, 9, 3, 4}, 3, 4)}), 1);
  EXPECT_EQ(shared_prefix({sequence_of({1, 2}, 1, 2), sequence_of({1, 3}, 1, 2)}), 0);
}

TEST(Batching, HoldsEveryItemOnceAndTheBudget) {
  std::vector<Item> items;
  for (int64_t i = 0; i < 50; ++i) {
    std::vector<int64_t> tokens(static_cast<size_t>(2 + i * 7 % 60), i);
    items.push_back({sequence_of(tokens, 1, static_cast<int64_t>(tokens.size()))});
  }
  for (const int64_t budget : {1, 100, 1000}) {
    std::vector<int> seen(items.size());
    for (const Batch& batch : plan_batches(items, budget, 16, true)) {
      size_t longest = 0;
      for (const size_t i : batch.items) {
        ++seen[i];
        longest = std::max(longest, items[i][0].tokens.size() - 1);
      }
      EXPECT_TRUE(batch.items.size() == 1 || static_cast<int64_t>(batch.items.size() * longest) <= budget);
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), 50);
  }
}

TEST(Scoring, RefusesASequenceWithoutATokenToScore) {
  const auto model = random_model(small_config("ssd", 2), at::kFloat, 1);
  EXPECT_THROW(score(model, {{sequence_of({1, 2}, 2, 2)}}), Error);
  EXPECT_THROW(score(model, {{sequence_of({1, 2}, 0, 2)}}), Error);
  EXPECT_THROW(score(model, {{}}), Error);
}

}  // namespace
}  // namespace oryx::evaluation
