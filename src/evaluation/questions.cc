#include "evaluation/questions.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "evaluation/harness_text.h"
#include "evaluation/statistics.h"
#include "generation/generator.h"

namespace oryx::evaluation {

namespace {

constexpr int64_t kDecodeBatch = 1024;

std::vector<std::vector<int64_t>> end_of_text_stops(const tokenizer::Tokenizer& tokenizer) {
  try {
    return {{tokenizer.end_of_text()}};
  } catch (const Error&) {
    return {};  // a tokenizer without one
  }
}

// The text before the first line's end.
std::string first_line(const generation::Completion& completion, const tokenizer::Tokenizer& tokenizer) {
  std::string text;
  for (const generation::Token& token : completion.tokens) {
    const auto id = static_cast<int32_t>(token.id);
    if (!tokenizer.is_special(id)) text += tokenizer.token_bytes(id);
  }
  return text.substr(0, text.find('\n'));
}

}  // namespace

Question make_question(const tokenizer::Tokenizer& tokenizer, std::string_view context,
                       std::string_view prompt, std::vector<std::string> answers, int64_t budget,
                       const std::string& where) {
  const std::vector<int32_t> ids =
      tokenizer.encode(std::string(context) + std::string(prompt), /*allow_special=*/false);
  Question question{.prompt = {ids.begin(), ids.end()}, .answers = std::move(answers)};
  for (size_t bytes = 0; question.query < static_cast<int64_t>(ids.size()); ++question.query) {
    bytes += tokenizer.token_bytes(ids[static_cast<size_t>(question.query)]).size();
    if (bytes > context.size()) break;
  }
  const auto size = static_cast<int64_t>(ids.size());
  expect(size - question.query < budget, "{}: the prompt alone has {} tokens, the budget is {}", where,
         size - question.query, budget);
  if (size > budget) {
    const auto query = question.prompt.begin() + question.query;
    question.prompt.erase(query - (size - budget), query);
    question.query -= size - budget;
    question.is_cut = true;
  }
  return question;
}

std::optional<std::vector<Answer>> answer_all(const std::vector<Question>& questions,
                                              const ScheduleForm& schedule, int64_t max_new_tokens,
                                              const Runner& runner, TaskResult& result) {
  std::vector<generation::Request> requests;
  const auto stops = end_of_text_stops(runner.tokenizer);
  for (const Question& question : questions) {
    requests.push_back({.prompt = question.prompt,
                        .schedule = schedule.at(question.query),
                        .max_tokens = max_new_tokens,
                        .stops = stops});
    result.items_cut += question.is_cut;
  }
  // Two batches of scoring fit as caches: no activations are kept where token after token is written.
  const generation::Generator generator(
      runner.model, runner.tokenizer.vocabulary_size(),
      {.piece_tokens = runner.batch_tokens, .batch = kDecodeBatch, .batch_tokens = 2 * runner.batch_tokens});
  std::vector<int64_t> counts(questions.size());
  const auto completions =
      generator.generate(requests, {.on_token =
                                        [&](size_t i, const generation::Token& token) {
                                          const auto id = static_cast<int32_t>(token.id);
                                          const bool ends = runner.tokenizer.is_special(id) ||
                                                            runner.tokenizer.token_bytes(id).find('\n') !=
                                                                std::string_view::npos;
                                          if ((ends || ++counts[i] == max_new_tokens) && runner.on_items)
                                            runner.on_items(1);
                                          return !ends;
                                        },
                                    .cancelled = runner.cancelled});

  CostMeter meter(runner.model.config(), runner.model.dtype());
  std::vector<Answer> answers;
  for (size_t i = 0; i < questions.size(); ++i) {
    if (completions[i].finish == generation::FinishReason::cancelled) return std::nullopt;
    meter.add(completions[i].modes);
    const auto written = static_cast<int64_t>(completions[i].tokens.size());
    result.tokens_run += static_cast<int64_t>(questions[i].prompt.size()) + written - 1;
    Answer answer{.text = first_line(completions[i], runner.tokenizer), .tokens = written};
    answer.contains = contains_answer(answer.text, questions[i].answers);
    answers.push_back(std::move(answer));
  }
  result.cost = meter.total();
  return answers;
}

Table answer_record(int64_t id, const Question& question, const Answer& answer) {
  Array texts;
  for (const std::string& text : question.answers) texts.push_back(Value{text});
  Table record;
  record.set("id", Value{id});
  record.set("continuation", Value{answer.text});
  record.set("answers", Value{std::move(texts)});
  record.set("contained", Value{answer.contains});
  record.set("prompt_tokens", Value{static_cast<int64_t>(question.prompt.size())});
  record.set("query", Value{question.query});
  record.set("new_tokens", Value{answer.tokens});
  record.set("cut", Value{question.is_cut});
  return record;
}

Metric contains_metric(const std::vector<Answer>& answers) {
  std::vector<double> values;
  for (const Answer& answer : answers) values.push_back(answer.contains ? 1 : 0);
  return mean_metric("contains", values);
}

}  // namespace oryx::evaluation
