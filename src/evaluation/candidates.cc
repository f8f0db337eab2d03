#include "evaluation/candidates.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "evaluation/for_items.h"
#include "evaluation/harness_text.h"

namespace oryx::evaluation {

Candidate make_candidate(const tokenizer::Tokenizer& tokenizer, std::string_view context,
                         std::string_view continuation, const TaskOptions& options,
                         const std::string& where) {
  EncodedPair pair = encode_pair(tokenizer, context, continuation);
  const auto scored = static_cast<int64_t>(pair.continuation.size());
  expect(scored > 0, "{}: the continuation has no token of its own after its context", where);
  expect(scored <= options.max_length, "{}: the continuation has {} tokens, more than the {} of max-length",
         where, scored, options.max_length);
  Candidate candidate{.tokens = std::move(pair.context)};
  candidate.first = static_cast<int64_t>(candidate.tokens.size());
  candidate.tokens.insert(candidate.tokens.end(), pair.continuation.begin(), pair.continuation.end());
  // The last token is predicted, never read.
  const int64_t excess = static_cast<int64_t>(candidate.tokens.size()) - 1 - options.max_length;
  if (excess > 0) {
    expect(!options.refuse_long, "{}: {} tokens are more than the {} of max-length", where,
           candidate.tokens.size() - 1, options.max_length);
    candidate.tokens.erase(candidate.tokens.begin(), candidate.tokens.begin() + excess);
    candidate.first -= excess;
    candidate.is_cut = true;
  }
  return candidate;
}

std::optional<Scores> score_candidates(const std::vector<std::vector<Candidate>>& items,
                                       const ScheduleForm& schedule, bool has_query, bool greedy,
                                       const Runner& runner, TaskResult& result) {
  std::vector<Item> sequences(items.size());
  for_items(items.size(), [&](size_t i) {
    for (const Candidate& candidate : items[i]) {
      const auto query = has_query ? std::optional(candidate.first) : std::nullopt;
      auto modes = schedule.spans(static_cast<int64_t>(candidate.tokens.size()), query);
      sequences[i].push_back({candidate.tokens, candidate.first, std::move(modes)});
    }
  });
  CostMeter meter(runner.model.config(), runner.model.dtype());
  for (size_t i = 0; i < items.size(); ++i) {
    for (const Sequence& sequence : sequences[i]) meter.add(sequence.modes);
    result.items_cut += std::any_of(items[i].begin(), items[i].end(),
                                    [](const Candidate& candidate) { return candidate.is_cut; });
  }
  ScoringOptions options{.batch_tokens = runner.batch_tokens, .greedy = greedy};
  options.on_items = runner.on_items;
  options.cancelled = runner.cancelled;
  std::optional<Scores> scores = score(runner.model, sequences, options);
  for_items(sequences.size(), [&](size_t i) { Item().swap(sequences[i]); });  // freed on all cores too
  if (!scores) return std::nullopt;
  result.cost = meter.total();
  result.tokens_run = scores->tokens_run;
  result.tokens_computed = scores->tokens_computed;
  result.tokens_scored = scores->tokens_scored;
  return scores;
}

Array to_array(const std::vector<double>& numbers) {
  Array array;
  for (const double number : numbers) array.push_back(Value{number});
  return array;
}

Array to_array(const std::vector<int64_t>& numbers) {
  Array array;
  for (const int64_t number : numbers) array.push_back(Value{number});
  return array;
}

}  // namespace oryx::evaluation
