// The schedules of an evaluation: texts as everywhere, and two words more that only a task can fill in.
//
//   linear,attention@query   the span starts at the first token of the question: of the prompt after a
//                            haystack or document, of a continuation after its context
//   linear->attention        one mode for the context, another for the answer, split where the task has it:
//                            at the query of synthetic tasks, after 97.5% of the tokens elsewhere
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "model/config.h"
#include "schedule/schedule.h"

namespace oryx::evaluation {

class ScheduleForm {
 public:
  // Throws UsageError as Schedule::parse does.
  static ScheduleForm parse(std::string_view text);

  // As results name it.
  const std::string& text() const { return text_; }

  // FROM->TO with its split filled in: a START of the schedule grammar, or "query".
  ScheduleForm split_at(std::string_view start) const;

  bool needs_query() const { return text_.find(kQuery) != std::string::npos; }
  bool is_split() const { return text_.find(kArrow) != std::string::npos; }

  // `query`: the first token of the question. Throws UsageError where it is needed and absent.
  schedule::Schedule at(std::optional<int64_t> query) const;
  // The modes of a sequence of `length` known tokens.
  schedule::ModeSpans spans(int64_t length, std::optional<int64_t> query) const;

  // Throws UsageError when the schedule asks for a mode that the model lacks.
  void expect_served_by(const model::ModelConfig& config) const;

 private:
  static constexpr std::string_view kQuery = "@query", kArrow = "->";

  std::string text_;
  std::optional<schedule::Schedule> fixed_;  // without a query to fill in
};

}  // namespace oryx::evaluation
