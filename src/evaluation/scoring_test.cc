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
  EXPECT_TRUE(rc::check([] {
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
    RC_ASSERT(scores->tokens_computed >= scores->tokens_run);
  }));
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
  EXPECT_EQ(before->tokens_computed, after->tokens_computed);
  EXPECT_GT(before->tokens_computed, before->tokens_run);
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

TEST(Batching, HoldsEverySequenceOnceAndTheBudget) {
  EXPECT_TRUE(rc::check([] {
    const model::ModelConfig config = small_config("ssd", 1);
    std::mt19937 dice(*rc::gen::arbitrary<uint32_t>());
    const std::vector<Item> items = random_items(config, dice, 60);
    for (const int64_t budget : {1, 100, 1000}) {
      for (const bool share : {false, true}) {
        std::vector<std::vector<int>> seen;
        for (const Item& item : items) seen.emplace_back(item.size());
        int64_t computed = 0;
        for (const Batch& batch :
             plan_batches(items, {.batch_tokens = budget, .pass_cost = 1, .share_prefixes = share})) {
          int64_t before = 0;
          for (size_t i = 0; i < batch.items.size(); ++i) {
            const int64_t prefix =
                items[batch.items[i]].size() > 1 ? shared_prefix(items[batch.items[i]]) : 0;
            RC_ASSERT(batch.shared[i] == (share ? prefix : 0));
            before = std::max(before, batch.shared[i]);
          }
          const auto count = static_cast<int64_t>(batch.items.size());
          RC_ASSERT(before == 0 || count == 1 || count * before <= budget);
          for (const std::vector<Row>& pass : batch.passes) {
            int64_t rest = 0;
            for (const Row& row : pass) {
              ++seen[batch.items[row.item]][row.sequence];
              const auto size =
                  static_cast<int64_t>(items[batch.items[row.item]][row.sequence].tokens.size());
              rest = std::max(rest, size - 1 - batch.shared[row.item]);
            }
            const auto rows = static_cast<int64_t>(pass.size());
            RC_ASSERT(rows == 1 || rows * (before + rest) <= budget);
            computed += rows * rest;
          }
          computed += count * before - computed_tokens(batch, items);
        }
        RC_ASSERT(computed == 0);
        for (const std::vector<int>& item : seen) RC_ASSERT(item == std::vector<int>(item.size(), 1));
      }
    }
  }));
}

TEST(Batching, CutsWhereItCostsLeast) {
  // Two lengths: one pass where passes are dear, two where padding is.
  std::vector<Item> items;
  for (int64_t i = 0; i < 20; ++i) {
    const int64_t size = i % 2 == 0 ? 11 : 31;
    items.push_back({sequence_of(std::vector<int64_t>(static_cast<size_t>(size), i), 1, size)});
  }
  const auto plan = [&](int64_t pass_cost) {
    return plan_batches(items, {.batch_tokens = 10000, .pass_cost = pass_cost}).front();
  };
  EXPECT_EQ(plan(201).passes.size(), 1U);
  EXPECT_EQ(computed_tokens(plan(201), items), 20 * 30);
  EXPECT_EQ(plan(199).passes.size(), 2U);
  EXPECT_EQ(computed_tokens(plan(199), items), 10 * 30 + 10 * 10);
}

TEST(Batching, SharesOnlyWhereThatIsCheaper) {
  const std::vector<int64_t> context(20, 3);
  Item item;
  for (int64_t choice = 0; choice < 4; ++choice) {
    std::vector<int64_t> tokens = context;
    tokens.insert(tokens.end(), {choice, choice});
    item.push_back(sequence_of(tokens, 20, 22));
  }
  // 19 shared tokens: 19 + 4 · 2 instead of 4 · 21 tokens, for one pass more.
  EXPECT_TRUE(plan_batches({item}, {.batch_tokens = 1000, .pass_cost = 56})[0].shares());
  EXPECT_FALSE(plan_batches({item}, {.batch_tokens = 1000, .pass_cost = 58})[0].shares());
}

TEST(Scoring, RefusesASequenceWithoutATokenToScore) {
  const auto model = random_model(small_config("ssd", 2), at::kFloat, 1);
  EXPECT_THROW(score(model, {{sequence_of({1, 2}, 2, 2)}}), Error);
  EXPECT_THROW(score(model, {{sequence_of({1, 2}, 0, 2)}}), Error);
  EXPECT_THROW(score(model, {{}}), Error);
}

}  // namespace
}  // namespace oryx::evaluation
