#include "evaluation/scoring.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "evaluation/batching.h"

namespace oryx::evaluation {

namespace {

using model::JointState;
using schedule::ModeSpans;

// Tokens that could be computed in the time that starting a forward pass takes.
constexpr int64_t kPassCostCpu = 16, kPassCostGpu = 2048;
// Logits held at once where the most likely token is asked for.
constexpr int64_t kLogitsAtOnce = int64_t{64} << 20;

// The schedules of a batch, one for all sequences where they are equal.
std::vector<ModeSpans> joined(std::vector<ModeSpans> spans) {
  const bool equal =
      std::all_of(spans.begin(), spans.end(), [&](const auto& other) { return other == spans.front(); });
  if (equal) spans.resize(1);
  return spans;
}

// `modes` from `begin` to `end`, the last one going on past the end of the sequence into its padding.
ModeSpans padded(ModeSpans modes, int64_t begin, int64_t end) {
  modes.back().end = std::max(modes.back().end, end);
  return schedule::cut(modes, begin, end);
}

// What a batch was asked, on its way back from the device.
struct Pending {
  Batch batch;
  at::Tensor losses;  // [rows] of the scored tokens, sequence by sequence
  at::Tensor greedy;  // [rows] bool, if asked for
};

class Scorer {
 public:
  Scorer(const model::LanguageModel& model, const std::vector<Item>& items, const ScoringOptions& options,
         Scores& scores)
      : model_(model), items_(items), options_(options), scores_(scores) {}

  // Starts the work; a device is not waited for.
  Pending launch(const Batch& batch) {
    std::vector<const Sequence*> rows;
    std::vector<int64_t> item_of_row;
    for (size_t i = 0; i < batch.items.size(); ++i) {
      for (const Sequence& sequence : items_[batch.items[i]]) {
        rows.push_back(&sequence);
        item_of_row.push_back(static_cast<int64_t>(i));
      }
    }
    std::optional<JointState> state;
    if (batch.shared > 0) {
      state = read_prefixes(batch).select(at::tensor(item_of_row, at::kLong));
      scores_.tokens_run += batch.shared * static_cast<int64_t>(batch.items.size());
    }
    return read_rest(batch, rows, state ? &*state : nullptr);
  }

  // Waits for the results of a batch and files them.
  void collect(const Pending& pending) {
    const at::Tensor losses = pending.losses.to(at::kCPU, at::kDouble).contiguous();
    const double* loss = losses.const_data_ptr<double>();
    const at::Tensor greedy = pending.greedy.defined() ? pending.greedy.cpu().contiguous() : at::Tensor();
    const bool* is_greedy = greedy.defined() ? greedy.const_data_ptr<bool>() : nullptr;
    for (const size_t index : pending.batch.items) {
      for (const Sequence& sequence : items_[index]) {
        const auto count = static_cast<int64_t>(sequence.tokens.size()) - sequence.first;
        SequenceScore score;
        for (int64_t i = 0; i < count; ++i) score.log_likelihoods.push_back(-loss[i]);
        if (is_greedy) score.is_greedy.assign(is_greedy, is_greedy + count);
        loss += count;
        if (is_greedy) is_greedy += count;
        scores_.items[index].push_back(std::move(score));
      }
    }
    if (options_.on_items) options_.on_items(static_cast<int64_t>(pending.batch.items.size()));
  }

 private:
  // The joint state, one row an item, after the tokens that its sequences have in common.
  JointState read_prefixes(const Batch& batch) const {
    const auto count = static_cast<int64_t>(batch.items.size());
    JointState state = model_.empty_state(count);
    at::Tensor tokens = at::empty({count, batch.shared}, at::kLong);
    int64_t* out = tokens.mutable_data_ptr<int64_t>();
    std::vector<ModeSpans> spans;
    for (const size_t index : batch.items) {
      const Sequence& sequence = items_[index].front();
      out = std::copy_n(sequence.tokens.begin(), batch.shared, out);
      spans.push_back(schedule::cut(sequence.modes, 0, batch.shared));
    }
    model_.hidden(tokens.to(model_.device()), joined(std::move(spans)), &state);
    return state;
  }

  Pending read_rest(const Batch& batch, const std::vector<const Sequence*>& rows, JointState* state) {
    int64_t longest = 0;
    for (const Sequence* row : rows) {
      longest = std::max(longest, static_cast<int64_t>(row->tokens.size()) - 1);
    }
    const int64_t time = longest - batch.shared;
    at::Tensor tokens = at::zeros({static_cast<int64_t>(rows.size()), time}, at::kLong);
    int64_t* out = tokens.mutable_data_ptr<int64_t>();
    std::vector<ModeSpans> spans;
    std::vector<int64_t> places, targets;  // of the scored tokens: row of the hidden states, id
    for (size_t r = 0; r < rows.size(); ++r) {
      const Sequence& row = *rows[r];
      const auto size = static_cast<int64_t>(row.tokens.size());
      const int64_t begin = static_cast<int64_t>(r) * time;
      std::copy(row.tokens.begin() + batch.shared, row.tokens.end() - 1, out + begin);
      spans.push_back(padded(row.modes, batch.shared, longest));
      for (int64_t t = row.first; t < size; ++t) places.push_back(begin + t - 1 - batch.shared);
      targets.insert(targets.end(), row.tokens.begin() + row.first, row.tokens.end());
      scores_.tokens_run += size - 1 - batch.shared;
    }
    at::Tensor hidden = model_.hidden(tokens.to(model_.device()), joined(std::move(spans)), state);
    hidden = hidden.index_select(0, at::tensor(places, at::kLong).to(model_.device()));
    const at::Tensor ids = at::tensor(targets, at::kLong).to(model_.device());
    Pending pending{batch, model_.loss(hidden, ids, 1.0).second, {}};
    if (options_.greedy) pending.greedy = greedy_of(hidden, ids);
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

  const model::LanguageModel& model_;
  const std::vector<Item>& items_;
  const ScoringOptions& options_;
  Scores& scores_;
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
  const c10::NoGradGuard no_grad;
  for (const Item& item : items) expect_scorable(item);
  Scores scores;
  scores.items.resize(items.size());
  Scorer scorer(model, items, options, scores);
  const int64_t pass_cost = model.device().is_cpu() ? kPassCostCpu : kPassCostGpu;
  // A device works on one batch while the next is prepared.
  std::optional<Pending> pending;
  for (const Batch& batch : plan_batches(items, options.batch_tokens, pass_cost, options.share_prefixes)) {
    if (options.cancelled && options.cancelled()) return std::nullopt;
    Pending next = scorer.launch(batch);
    if (pending) scorer.collect(*pending);
    pending = std::move(next);
  }
  if (pending) scorer.collect(*pending);
  return scores;
}

}  // namespace oryx::evaluation
