#include "evaluation/needle.h"

#include <gtest/gtest.h>

#include <map>
#include <regex>
#include <set>

#include "base/error.h"
#include "evaluation/associative_recall.h"
#include "evaluation/questions.h"

namespace oryx::evaluation {
namespace {

const std::vector<std::string> kEssay = {"It",      "was",    "late.", "\"Who",
                                         "goes?\"", "Nobody", "spoke", "then."};

int64_t count(const std::string& text, const std::string& part) {
  int64_t found = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++found;
  return found;
}

TEST(Needle, StandsOnceAtItsDepth) {
  for (const char* task : {"needle_single_1", "needle_single_2", "needle_single_3", "needle_multikey_1",
                           "needle_multikey_2", "needle_multikey_3", "kv_uuid"}) {
    const NeedleKind kind = needle_kind(task);
    for (const double depth : {0.0, 0.5, 1.0}) {
      const NeedleText text = make_needle(kind, 200, depth, kEssay, 1, 7);
      EXPECT_EQ(count(text.context, text.answer), 1) << task;
      EXPECT_EQ(count(text.prompt, text.answer), 0) << task;
      EXPECT_NEAR(text.depth, depth, 0.05) << task;
      const double place = static_cast<double>(text.context.find(text.answer)) / text.context.size();
      EXPECT_NEAR(place, depth, 0.2) << task << " " << depth;
      EXPECT_EQ(make_needle(kind, 200, depth, kEssay, 1, 7).context, text.context);
      EXPECT_NE(make_needle(kind, 200, depth, kEssay, 1, 8).answer, text.answer);
      EXPECT_NE(make_needle(kind, 40, depth, kEssay, 2, 7).answer, text.answer);
    }
  }
}

TEST(Needle, IsTheTextOfRuler) {
  const NeedleText text = make_needle(needle_kind("needle_single_1"), 2, 0.5, {}, 0, 0);
  const std::regex context(
      "A special magic number is hidden within the following text\\. Make sure to memorize it\\. I will quiz "
      "you "
      "about the number afterwards\\.\nThe grass is green\\. The sky is blue\\. The sun is yellow\\. Here we "
      "go\\. "
      "There and back again\\.\nOne of the special magic numbers for [a-z]+-[a-z]+ is: [0-9]{7}\\.\nThe "
      "grass is "
      "green\\. The sky is blue\\. The sun is yellow\\. Here we go\\. There and back again\\.");
  EXPECT_TRUE(std::regex_match(text.context, context)) << text.context;
  const std::regex prompt(
      "\nWhat is the special magic number for ([a-z]+-[a-z]+) mentioned in the provided text\\? The special "
      "magic "
      "number for \\1 mentioned in the provided text is");
  EXPECT_TRUE(std::regex_match(text.prompt, prompt)) << text.prompt;
  const std::regex uuid("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}");
  const NeedleText third = make_needle(needle_kind("needle_single_3"), 20, 0.5, kEssay, 0, 0);
  EXPECT_TRUE(std::regex_match(third.answer, uuid)) << third.answer;
  EXPECT_EQ(count(make_needle(needle_kind("needle_multikey_1"), 40, 0.5, kEssay, 0, 0).context, "One of the"),
            4);
}

TEST(Question, KeepsThePromptWhole) {
  const auto bytes = tokenizer::Tokenizer::load("bytes");
  const Question whole = make_question(*bytes, "context", "?why", {"x"}, 11, "file:1");
  EXPECT_EQ(whole.query, 7);
  EXPECT_FALSE(whole.is_cut);
  const Question cut = make_question(*bytes, "context", "?why", {"x"}, 7, "file:1");
  EXPECT_EQ(cut.prompt, (std::vector<int64_t>{'c', 'o', 'n', '?', 'w', 'h', 'y'}));
  EXPECT_EQ(cut.query, 3);
  EXPECT_TRUE(cut.is_cut);
  EXPECT_THROW(make_question(*bytes, "context", "?why", {"x"}, 4, "file:1"), Error);
}

TEST(AssociativeRecall, AsksForEveryKeyOnce) {
  for (const int64_t pairs : {1, 5, 16}) {
    const RecallShape shape{64, pairs, 50};
    const RecallSequence sequence = make_recall(shape, RecallSplit::evaluation, 1, 3);
    ASSERT_EQ(sequence.tokens.size(), 64);
    ASSERT_EQ(static_cast<int64_t>(sequence.values.size()), pairs);
    std::set<int64_t> keys, asked;
    for (int64_t i = 0; i < pairs; ++i) {
      keys.insert(sequence.tokens[2 * i]);
      EXPECT_LT(sequence.tokens[2 * i], 25);
      EXPECT_GE(sequence.tokens[2 * i + 1], 25);
    }
    for (const int64_t position : sequence.values) {
      EXPECT_GT(position, 2 * pairs);
      const int64_t key = sequence.tokens[position - 1];
      asked.insert(key);
      for (int64_t i = 0; i < pairs; ++i) {
        if (sequence.tokens[2 * i] == key) {
          EXPECT_EQ(sequence.tokens[position], sequence.tokens[2 * i + 1]);
        }
      }
    }
    EXPECT_EQ(keys.size(), static_cast<size_t>(pairs));
    EXPECT_EQ(asked, keys);
    EXPECT_NE(make_recall(shape, RecallSplit::training, 1, 3).tokens, sequence.tokens);
  }
  // More queries: still every key, then any of them, each with its value.
  const RecallShape dense{64, 5, 50, 27};
  const RecallSequence sequence = make_recall(dense, RecallSplit::training, 1, 3);
  ASSERT_EQ(sequence.values.size(), 27u);  // all slots
  std::map<int64_t, int64_t> values, asked;
  for (int64_t i = 0; i < 5; ++i) values[sequence.tokens[2 * i]] = sequence.tokens[2 * i + 1];
  for (const int64_t position : sequence.values) {
    ++asked[sequence.tokens[position - 1]];
    EXPECT_EQ(sequence.tokens[position], values.at(sequence.tokens[position - 1])) << position;
  }
  EXPECT_EQ(asked.size(), 5u);
  for (const int64_t queries : {4, 28}) {
    EXPECT_THROW(validate(RecallShape{64, 5, 50, queries}), UsageError) << queries;
  }
  EXPECT_THROW(validate(RecallShape{64, 17, 50}), UsageError);
  EXPECT_THROW(validate(RecallShape{64, 16, 32}), UsageError);
}

}  // namespace
}  // namespace oryx::evaluation
