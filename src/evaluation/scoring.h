// Log-likelihoods of given tokens: the engine below every task that reads and does not write.
//
// Sequences of similar length run together, padded on the right, which neither a token before the padding nor
// a state sees. What the sequences of one item begin with (the context of several choices) is read once, and
// its joint state, as far as the rest needs it, copied for each. Results depend neither on the size of the
// batches nor on the order of the items, except for the rounding of sums in another shape. A device is never
// waited for before the passes that follow are under way.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "model/language_model.h"
#include "schedule/spans.h"

namespace oryx::evaluation {

struct Sequence {
  std::vector<int64_t> tokens;  // at least two
  int64_t first = 1;            // tokens[first …] are scored, each given all before it
  schedule::ModeSpans modes;    // of all tokens; the last token's own mode decides nothing
};

// Sequences that may share what they begin with.
using Item = std::vector<Sequence>;

struct SequenceScore {
  std::vector<double> log_likelihoods;  // of tokens[first …]
  // Whether each is the most likely of the model's rows, ties to the lower id. Empty unless asked for.
  std::vector<bool> is_greedy;

  double sum() const;
  bool all_greedy() const;
};

struct ScoringOptions {
  int64_t batch_tokens = 4096;  // of the sequences of a pass, padding included; a longer one runs alone
  bool greedy = false;          // fill is_greedy, which costs a second product with the head
  bool share_prefixes = true;
  std::function<void(int64_t items)> on_items = {};  // called with the number just done
  std::function<bool()> cancelled = {};              // polled between passes
};

struct Scores {
  std::vector<std::vector<SequenceScore>> items;  // as the items given
  int64_t tokens_run = 0;                         // that the model read: shared ones once, no padding
  int64_t tokens_computed = 0;                    // with the padding
  int64_t tokens_scored = 0;
};

// Nothing when cancelled. Throws Error on a sequence without a token to score.
std::optional<Scores> score(const model::LanguageModel& model, const std::vector<Item>& items,
                            const ScoringOptions& options = {});

}  // namespace oryx::evaluation
