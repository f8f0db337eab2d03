// Prompts answered by greedy decoding and scored by "contains an answer".
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "evaluation/task.h"

namespace oryx::evaluation {

struct Question {
  std::vector<int64_t> prompt;
  int64_t query = 0;  // the first token of the question, after what it is about
  std::vector<std::string> answers;
  bool is_cut = false;  // tokens before the query were dropped
};

// `context` and `prompt` encoded together; the query is the first token that holds a byte of the prompt. Past
// `budget` tokens the end of the context is dropped, the prompt stays whole. Throws Error naming `where` when
// the prompt alone takes the budget.
Question make_question(const tokenizer::Tokenizer& tokenizer, std::string_view context,
                       std::string_view prompt, std::vector<std::string> answers, int64_t budget,
                       const std::string& where);

struct Answer {
  std::string text;  // up to a line's end, the end-of-text token, or max_new_tokens
  int64_t tokens = 0;
  bool contains = false;
};

// One answer a question; adds up what they cost. Nothing when cancelled.
std::optional<std::vector<Answer>> answer_all(const std::vector<Question>& questions,
                                              const ScheduleForm& schedule, int64_t max_new_tokens,
                                              const Runner& runner, TaskResult& result);

// The record of an item and the share of answers: what every such task reports.
Table answer_record(int64_t id, const Question& question, const Answer& answer);
Metric contains_metric(const std::vector<Answer>& answers);

}  // namespace oryx::evaluation
