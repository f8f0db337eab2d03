// What the log-likelihood tasks hand to the scoring engine: encoded sequences without their schedule.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "evaluation/scoring.h"
#include "evaluation/statistics.h"
#include "evaluation/task.h"

namespace oryx::evaluation {

struct Candidate {
  std::vector<int64_t> tokens;
  int64_t first = 1;    // tokens[first …] are scored
  bool is_cut = false;  // tokens on the left were dropped
};

// The continuation after its context, cut on the left to what the model may read at once. Throws Error naming
// `where` for a continuation longer than that, and for any cut where options refuse it.
Candidate make_candidate(const tokenizer::Tokenizer& tokenizer, std::string_view context,
                         std::string_view continuation, const TaskOptions& options, const std::string& where);

// Scores all items under a schedule whose query is the first scored token (none with `has_query` false), and
// adds up what they cost. Nothing when cancelled.
std::optional<Scores> score_candidates(const std::vector<std::vector<Candidate>>& items,
                                       const ScheduleForm& schedule, bool has_query, bool greedy,
                                       const Runner& runner, TaskResult& result);

// Numbers as a JSON list.
Array to_array(const std::vector<double>& numbers);
Array to_array(const std::vector<int64_t>& numbers);

}  // namespace oryx::evaluation
