#include "evaluation/scoring.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <deque>
#include <numeric>
#include <utility>

#include "base/device_copy.h"
#include "base/error.h"
#include "evaluation/batching.h"

namespace oryx::evaluation {

namespace {

using model::JointState;
using schedule::ModeSpans;

// Tokens that could be computed in the time that starting a forward pass takes.
constexpr int64_t kPassCostCpu = 16, kPassCostGpu = 768;
// Logits held at once where the most likely token is asked for.
constexpr int64_t kLogitsAtOnce = int64_t{64} << 20;
// Passes that a device may have before it while the next is prepared.
constexpr size_t kPassesAhead = 4;

// The schedules of a pass, one for all sequences where they are equal.
std::vector<ModeSpans> joined(std::vector<ModeSpans> spans) {
  const bool equal =
      std::all_of(spans.begin(), spans.end(), [&](const auto& other) { return other == spans.front(); });
  if (equal) spans.resize(1);
  return spans;
}

// A sequence of a pass.
struct Part {
  size_t item, sequence;
  int64_t begin;  // tokens before were read with those of the item's other sequences
};

// What a pass was asked, on its way back from the device.
struct Pending {
  std::vector<Part> parts;
  Arrival losses;                 // [rows] of the scored tokens, sequence by sequence
  std::optional<Arrival> greedy;  // [rows] bool, if asked for
};

class Scorer {
 public:
  Scorer(const model::LanguageModel& model, const std::vector<Item>& items, const ScoringOptions& options)
      : model_(model), items_(items), options_(options) {
    scores_.items.resize(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      scores_.items[i].resize(items[i].size());
      unfinished_.push_back(items[i].size());
    }
  }

  // False when cancelled.
  bool run(const Batch& batch) {
    std::optional<JointState> state;
    if (batch.shares()) state = read_prefixes(batch);
    scores_.tokens_computed += computed_tokens(batch, items_);
    for (const std::vector<Row>& pass : batch.passes) {
      if (options_.cancelled && options_.cancelled()) return false;
      pending_.push_back(read_rest(batch, pass, state ? &*state : nullptr));
      // Where there is no device to wait for, results are there at once.
      const size_t ahead = model_.device().is_cpu() ? 0 : kPassesAhead;
      while (pending_.size() > ahead) collect();
    }
    return true;
  }

  Scores finish() {
    while (!pending_.empty()) collect();
    return std::move(scores_);
  }

 private:
  // The joint state, one row an item, after the tokens that its sequences have in common.
  JointState read_prefixes(const Batch& batch) {
    const auto count = static_cast<int64_t>(batch.items.size());
    const int64_t time = batch.shared.front();  // the most
    at::Tensor tokens = at::zeros({count, time}, at::kLong);
    int64_t* out = tokens.mutable_data_ptr<int64_t>();
    std::vector<ModeSpans> spans;
    model::NextModes next{.attention = false, .linear = false};
    for (size_t i = 0; i < batch.items.size(); ++i, out += time) {
      const Item& item = items_[batch.items[i]];
      std::copy_n(item.front().tokens.begin(), batch.shared[i], out);
      spans.push_back(schedule::cut(item.front().modes, 0, batch.shared[i]));
      scores_.tokens_run += batch.shared[i];
      for (const Sequence& sequence : item) {
        for (const schedule::ModeSpan& span : sequence.modes) {
          if (span.end <= batch.shared[i]) continue;
          (span.mode == schedule::Mode::attention ? next.attention : next.linear) = true;
        }
      }
    }
    JointState state = model_.empty_state(count, next);
    model_.hidden(copy_to(tokens, model_.device()), joined(std::move(spans)), &state, batch.shared);
    return state;
  }

  Pending read_rest(const Batch& batch, const std::vector<Row>& pass, const JointState* prefixes) {
    const auto count = static_cast<int64_t>(pass.size());
    std::vector<Part> parts;
    std::vector<int64_t> lengths, prefix_of_row;
    for (const Row& row : pass) {
      const size_t item = batch.items[row.item];
      parts.push_back({item, row.sequence, batch.shared[row.item]});
      lengths.push_back(static_cast<int64_t>(items_[item][row.sequence].tokens.size()) - 1 -
                        parts.back().begin);
      prefix_of_row.push_back(static_cast<int64_t>(row.item));
      scores_.tokens_run += lengths.back();
    }
    const int64_t time = *std::max_element(lengths.begin(), lengths.end());
    at::Tensor tokens = at::zeros({count, time}, at::kLong);
    int64_t* out = tokens.mutable_data_ptr<int64_t>();
    std::vector<ModeSpans> spans;
    std::vector<int64_t> places, targets;  // of the scored tokens: row of the hidden states, id
    for (size_t r = 0; r < parts.size(); ++r) {
      const Part& part = parts[r];
      const Sequence& sequence = items_[part.item][part.sequence];
      const auto size = static_cast<int64_t>(sequence.tokens.size());
      const int64_t first = static_cast<int64_t>(r) * time;
      std::copy(sequence.tokens.begin() + part.begin, sequence.tokens.end() - 1, out + first);
      spans.push_back(sequence.modes);
      for (int64_t t = sequence.first; t < size; ++t) places.push_back(first + t - 1 - part.begin);
      targets.insert(targets.end(), sequence.tokens.begin() + sequence.first, sequence.tokens.end());
    }
    scores_.tokens_scored += static_cast<int64_t>(targets.size());
    spans = joined(std::move(spans));
    const at::Device device = model_.device();
    const at::Tensor ids = copy_to(at::tensor(targets, at::kLong), device);
    const at::Tensor rows = copy_to(at::tensor(places, at::kLong), device);
    tokens = copy_to(tokens, device);
    at::Tensor hidden;
    if (prefixes != nullptr) {
      const JointState state = prefixes->select(at::tensor(prefix_of_row, at::kLong), time);
      hidden = model_.last_hidden(tokens, spans, state, lengths);
    } else {
      hidden = model_.hidden(tokens, spans, nullptr, lengths);
    }
    hidden = hidden.index_select(0, rows);
    Pending pending{std::move(parts), Arrival(model_.loss(hidden, ids, 1.0).second), {}};
    if (options_.greedy) pending.greedy.emplace(greedy_of(hidden, ids));
    return pending;
  }

  at::Tensor greedy_of(const at::Tensor& hidden, const at::Tensor& ids) const {
    const int64_t block = std::max<int64_t>(1, kLogitsAtOnce / model_.config().vocabulary / 4);
    std::vector<at::Tensor> parts;
    for (int64_t begin = 0; begin < ids.size(0); begin += block) {
      const int64_t end = std::min(ids.size(0), begin + block);
      parts.push_back(model_.logits(hidden.slice(0, begin, end)).argmax(-1).eq(ids.slice(0, begin, end)));
    }
    return at::cat(parts);
  }

  // Waits for the results of the oldest pass and files them.
  void collect() {
    Pending pending = std::move(pending_.front());
    pending_.pop_front();
    const at::Tensor losses = pending.losses.wait().to(at::kDouble);
    const double* loss = losses.const_data_ptr<double>();
    const bool* is_greedy = pending.greedy ? pending.greedy->wait().const_data_ptr<bool>() : nullptr;
    int64_t finished = 0;
    for (const Part& part : pending.parts) {
      const Sequence& sequence = items_[part.item][part.sequence];
      const auto count = static_cast<int64_t>(sequence.tokens.size()) - sequence.first;
      SequenceScore& score = scores_.items[part.item][part.sequence];
      for (int64_t i = 0; i < count; ++i) score.log_likelihoods.push_back(-loss[i]);
      if (is_greedy) score.is_greedy.assign(is_greedy, is_greedy + count);
      loss += count;
      if (is_greedy) is_greedy += count;
      if (--unfinished_[part.item] == 0) ++finished;
    }
    if (options_.on_items && finished > 0) options_.on_items(finished);
  }

  const model::LanguageModel& model_;
  const std::vector<Item>& items_;
  const ScoringOptions& options_;
  Scores scores_;
  std::vector<size_t> unfinished_;  // sequences of each item
  std::deque<Pending> pending_;
};

void expect_scorable(const Item& item) {
  expect(!item.empty(), "expected at least one sequence an item");
  for (const Sequence& sequence : item) {
    const auto size = static_cast<int64_t>(sequence.tokens.size());
    expect(sequence.first >= 1 && sequence.first < size,
           "expected a token to score after at least one other: got {} tokens, the first to score at {}",
           size, sequence.first);
  }
}

}  // namespace

double SequenceScore::sum() const {
  return std::accumulate(log_likelihoods.begin(), log_likelihoods.end(), 0.0);
}

bool SequenceScore::all_greedy() const {
  return std::all_of(is_greedy.begin(), is_greedy.end(), [](bool greedy) { return greedy; });
}

std::optional<Scores> score(const model::LanguageModel& model, const std::vector<Item>& items,
                            const ScoringOptions& options) {
  const c10::InferenceMode inference;
  for (const Item& item : items) expect_scorable(item);
  Scorer scorer(model, items, options);
  const BatchOptions plan{.batch_tokens = options.batch_tokens,
                          .pass_cost = model.device().is_cpu() ? kPassCostCpu : kPassCostGpu,
                          .share_prefixes = options.share_prefixes};
  for (const Batch& batch : plan_batches(items, plan)) {
    if (!scorer.run(batch)) return std::nullopt;
  }
  return scorer.finish();
}

}  // namespace oryx::evaluation
