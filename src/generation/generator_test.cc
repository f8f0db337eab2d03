#include "generation/generator.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <set>

#include "base/error.h"

namespace oryx::generation {
namespace {

using schedule::Schedule;

constexpr int64_t kIds = 61;  // of the tokenizer; three rows of padding follow

model::LanguageModel tiny_model(const std::string& linear, uint64_t seed = 1) {
  auto config = model::ModelConfig::with_mixers({"attention", linear});
  config.layers = 2;
  config.width = 32;
  config.heads = config.kv_heads = config.value_heads = 2;
  config.head_dim = config.value_dim = 16;
  config.mlp_width = 48;
  config.vocabulary = 64;
  auto weights = model::initial_weights(config, seed, at::kDouble);
  // Larger than at the start of training: the mixers must decide the next token, not the token itself through
  // the tied embedding.
  for (auto& [name, tensor] : weights.entries()) {
    if (tensor.dim() == 2) tensor.mul_(name == "embedding.weight" ? 5.0 : 20.0);
  }
  return {config, std::move(weights), at::kDouble};
}

std::vector<int64_t> some_prompt(int64_t length, int64_t salt) {
  std::vector<int64_t> prompt;
  for (int64_t i = 0; i < length; ++i) prompt.push_back((7 * i * i + 3 * i + salt) % kIds);
  return prompt;
}

std::vector<int64_t> ids_of(const Completion& completion) {
  std::vector<int64_t> ids;
  for (const Token& token : completion.tokens) ids.push_back(token.id);
  return ids;
}

// The definition: the whole sequence again for every token, no carried state.
std::vector<int64_t> greedy_from_scratch(const model::LanguageModel& model, const Request& request) {
  const c10::NoGradGuard no_grad;
  std::vector<int64_t> sequence = request.prompt;
  const auto known = static_cast<int64_t>(request.prompt.size());
  const auto modes = request.schedule.spans(known, known + request.max_tokens);
  for (int64_t i = 0; i < request.max_tokens; ++i) {
    const at::Tensor tokens = at::tensor(sequence, at::kLong).unsqueeze(0);
    const at::Tensor hidden = model.hidden(tokens, {schedule::cut(modes, 0, tokens.size(1))});
    sequence.push_back(model.logits(hidden)[-1].narrow(0, 0, kIds).argmax().item<int64_t>());
  }
  return {sequence.begin() + known, sequence.end()};
}

class GeneratorOf : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Linear, GeneratorOf, ::testing::Values("ssd", "gated_delta"));

TEST_P(GeneratorOf, GreedyIsTheArgmaxOfTheWholeSequence) {
  const auto model = tiny_model(GetParam());
  for (const char* text :
       {"attention", "linear", "attention,linear@generation", "linear,attention@50%,linear@24",
        "attention,linear@23,attention@25", "every(2,chunk=3)", "random(0.5,4,chunk=1)"}) {
    SCOPED_TRACE(text);
    const Request request{some_prompt(19, 5), Schedule::parse(text), 12};
    const auto expected = greedy_from_scratch(model, request);
    EXPECT_GT(std::set<int64_t>(expected.begin(), expected.end()).size(), 3u) << "too easy a text";
    // One piece, and pieces that do not divide the prompt.
    for (const int64_t piece : {2048, 7, 1}) {
      const Generator generator(model, kIds, {.piece_tokens = piece});
      EXPECT_EQ(ids_of(generator.generate({request})[0]), expected) << "pieces of " << piece;
    }
  }
}

TEST_P(GeneratorOf, ABatchIsItsSequencesAlone) {
  const auto model = tiny_model(GetParam());
  EXPECT_TRUE(rc::check([&] {
    // In a batch of more than four, one that ends stays for a while.
    const Generator generator(model, kIds,
                              {.piece_tokens = *rc::gen::element(32, 1000),
                               .batch = *rc::gen::element(4, 16),
                               .batch_tokens = *rc::gen::element(1, 60, 1000)});
    std::vector<Request> requests;
    const auto count = *rc::gen::inRange(2, 12);
    for (int i = 0; i < count; ++i) {
      const auto schedule = *rc::gen::element<std::string>("attention", "linear", "linear,attention@9",
                                                           "attention,linear@generation");
      // Few lengths, so that prompts share batches, whose sequences begin to write and end at different
      // times.
      requests.push_back(
          {some_prompt(*rc::gen::element<int64_t>(10, 11, 14, 30), *rc::gen::inRange<int64_t>(0, 60)),
           Schedule::parse(schedule),
           *rc::gen::inRange<int64_t>(1, 8),
           {.temperature = *rc::gen::element(0.0, 1.0), .top_k = 20, .seed = 11},
           static_cast<uint64_t>(i)});
    }
    int64_t read = 0, prompts = 0;
    for (const Request& request : requests) prompts += static_cast<int64_t>(request.prompt.size());
    const auto together =
        generator.generate(requests, {.on_prompt = [&](int64_t tokens) { read += tokens; }});
    RC_ASSERT(read == prompts);
    for (size_t i = 0; i < requests.size(); ++i) {
      const auto alone = generator.generate({requests[i]})[0];
      RC_ASSERT(ids_of(together[i]) == ids_of(alone));
      RC_ASSERT(together[i].modes == alone.modes);
    }
  }));
}

TEST(Generator, TokensCarryPositionModeAndLogprob) {
  const auto model = tiny_model("ssd");
  const Request request{some_prompt(6, 1), Schedule::parse("attention,linear@8"), 5};
  std::vector<int64_t> streamed;
  const auto completion =
      Generator(model, kIds).generate({request}, {.on_token = [&](size_t index, const Token& token) {
                                        EXPECT_EQ(index, 0u);
                                        streamed.push_back(token.id);
                                        return true;
                                      }})[0];
  EXPECT_EQ(streamed, ids_of(completion));
  EXPECT_EQ(completion.finish, FinishReason::length);
  EXPECT_EQ(completion.modes,
            (schedule::ModeSpans{{0, 8, schedule::Mode::attention}, {8, 11, schedule::Mode::linear}}));
  for (size_t i = 0; i < completion.tokens.size(); ++i) {
    const Token& token = completion.tokens[i];
    EXPECT_EQ(token.position, 6 + static_cast<int64_t>(i));
    EXPECT_EQ(token.mode, token.position < 8 ? schedule::Mode::attention : schedule::Mode::linear);
  }
  const c10::NoGradGuard no_grad;
  std::vector<int64_t> sequence = request.prompt;
  sequence.insert(sequence.end(), streamed.begin(), streamed.end());
  const auto modes = request.schedule.spans(6, 11);
  const auto logits =
      at::log_softmax(model.logits(model.hidden(at::tensor(sequence, at::kLong).unsqueeze(0), {modes})), 1);
  for (const Token& token : completion.tokens) {
    EXPECT_NEAR(token.logprob, logits[token.position - 1][token.id].item<double>(), 1e-9);
  }
}

TEST(Generator, StopsAtIdsAndSequences) {
  const auto model = tiny_model("gated_delta");
  Request request{some_prompt(9, 2), Schedule::parse("linear"), 10};
  request.sampling = {.temperature = 1.0, .seed = 3};
  const Generator generator(model, kIds);
  const auto free = ids_of(generator.generate({request})[0]);
  ASSERT_NE(free[3], free[4]);
  request.stops = {{free[3], free[4]}, {-1}};
  const auto stopped = generator.generate({request})[0];
  EXPECT_EQ(ids_of(stopped), std::vector<int64_t>(free.begin(), free.begin() + 5));
  EXPECT_EQ(stopped.finish, FinishReason::stop);
  EXPECT_EQ(stopped.stop_size, 2);
  EXPECT_EQ(stopped.modes.back().end, 9 + 5);

  request.stops = {};
  const auto refused = generator.generate(
      {request}, {.on_token = [](size_t, const Token& token) { return token.position < 10; }})[0];
  EXPECT_EQ(refused.tokens.size(), 2u);
  EXPECT_EQ(refused.finish, FinishReason::stop);
  EXPECT_EQ(refused.stop_size, 0);
}

TEST(Generator, CancelsBetweenPiecesAndTokens) {
  const auto model = tiny_model("ssd");
  const Request request{some_prompt(20, 2), Schedule::parse("linear"), 10};
  const Generator generator(model, kIds, {.piece_tokens = 5});
  int polls = 0;
  const auto early = generator.generate({request}, {.cancelled = [&] { return ++polls > 2; }})[0];
  EXPECT_TRUE(early.tokens.empty());
  EXPECT_EQ(early.finish, FinishReason::cancelled);
  polls = 0;
  const auto late = generator.generate({request}, {.cancelled = [&] { return ++polls > 6; }})[0];
  EXPECT_EQ(late.tokens.size(), 3u);
  EXPECT_EQ(late.finish, FinishReason::cancelled);
}

TEST(Generator, RefusesBadRequests) {
  const auto model = tiny_model("ssd");
  const Generator generator(model, kIds);
  const auto schedule = Schedule::parse("linear");
  EXPECT_THROW(generator.generate({{{}, schedule, 3}}), Error);
  EXPECT_THROW(generator.generate({{{1}, schedule, 0}}), UsageError);
  EXPECT_THROW(generator.generate({{{1, 64}, schedule, 3}}), Error);
  EXPECT_THROW(generator.generate({{{-1}, schedule, 3}}), Error);
  EXPECT_THROW(generator.generate({{{1}, schedule, 3, {.top_p = 0}}}), UsageError);
  EXPECT_THROW(generator.generate({{{1, 2}, Schedule::parse("linear,attention@-1,linear@1"), 3}}),
               UsageError);
  EXPECT_THROW(Generator(model, 65), Error);
}

}  // namespace
}  // namespace oryx::generation
