#include "evaluation/associative_recall.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "base/random.h"
#include "evaluation/candidates.h"
#include "evaluation/scoring.h"
#include "evaluation/statistics.h"

namespace oryx::evaluation {

namespace {

constexpr double kPower = 0.01;  // of the gaps, as in the paper

class RecallTask final : public Task {
 public:
  RecallTask(const std::string& name, const TaskOptions& options, const tokenizer::Tokenizer& tokenizer)
      : Task(name, "recall"), length_(options.mqar_length) {
    const int64_t samples = std::min(options.mqar_samples, options.limit.value_or(options.mqar_samples));
    for (const int64_t pairs : options.mqar_pairs) {
      const RecallShape shape{length_, pairs, plain_vocabulary(tokenizer)};
      validate(shape);
      for (int64_t i = 0; i < samples; ++i) {
        sequences_.push_back(
            make_recall(shape, RecallSplit::evaluation, options.seed, static_cast<uint64_t>(i)));
        pairs_.push_back(pairs);
      }
    }
  }

  int64_t items() const override { return static_cast<int64_t>(sequences_.size()); }

  std::optional<TaskResult> run(const ScheduleForm& schedule, const Runner& runner) const override {
    TaskResult result{.items = items(), .main = "acc"};
    std::vector<std::vector<Candidate>> items;
    for (size_t i = 0; i < sequences_.size(); ++i) {
      // From the first query on: it is the schedule's query, and what follows is looked at.
      items.push_back({{.tokens = sequences_[i].tokens, .first = 2 * pairs_[i]}});
    }
    const auto scores = score_candidates(items, schedule, true, /*greedy=*/true, runner, result);
    if (!scores) return std::nullopt;
    std::vector<double> shares;
    for (size_t i = 0; i < sequences_.size(); ++i) {
      const SequenceScore& score = scores->items[i][0];
      double log_likelihood = 0;
      int64_t right = 0;
      for (const int64_t position : sequences_[i].values) {
        const auto at = static_cast<size_t>(position - 2 * pairs_[i]);
        log_likelihood += score.log_likelihoods[at];
        right += score.is_greedy[at];
      }
      shares.push_back(static_cast<double>(right) / static_cast<double>(pairs_[i]));
      Table record;
      record.set("id", Value{static_cast<int64_t>(i)});
      record.set("pairs", Value{pairs_[i]});
      record.set("right", Value{right});
      record.set("log_likelihood", Value{log_likelihood});
      record.set("tokens", Value{length_});
      record.set("sequence", Value{to_array(sequences_[i].tokens)});
      record.set("value_positions", Value{to_array(sequences_[i].values)});
      result.records.push_back(std::move(record));
    }
    add_cells(shares, result);
    result.metrics = {mean_metric("acc", shares)};
    return result;
  }

 private:
  // Sequences of equal numbers of pairs follow each other.
  void add_cells(const std::vector<double>& shares, TaskResult& result) const {
    for (size_t begin = 0; begin < shares.size();) {
      size_t end = begin;
      double sum = 0;
      for (; end < shares.size() && pairs_[end] == pairs_[begin]; ++end) sum += shares[end];
      Table cell;
      cell.set("length", Value{length_});
      cell.set("pairs", Value{pairs_[begin]});
      cell.set("value", Value{sum / static_cast<double>(end - begin)});
      cell.set("items", Value{static_cast<int64_t>(end - begin)});
      result.cells.push_back(std::move(cell));
      begin = end;
    }
  }

  int64_t length_;
  std::vector<RecallSequence> sequences_;
  std::vector<int64_t> pairs_;
};

}  // namespace

void validate(const RecallShape& shape) {
  if (shape.pairs < 1) fail_usage("{} pairs: expected at least 1", shape.pairs);
  if (4 * shape.pairs > shape.length) {
    fail_usage("{} pairs and their queries take {} tokens, more than the length of {}", shape.pairs,
               4 * shape.pairs, shape.length);
  }
  if (shape.queries != 0 && (shape.queries < shape.pairs || shape.queries > shape.slots())) {
    fail_usage("{} queries: expected {} (one a pair) to {} (all that a length of {} has room for)",
               shape.queries, shape.pairs, shape.slots(), shape.length);
  }
  // A key each, as many values, and the filler.
  if (2 * shape.pairs + 2 > shape.vocabulary) {
    fail_usage("{} pairs need {} ids, the vocabulary has {}", shape.pairs, 2 * shape.pairs + 2,
               shape.vocabulary);
  }
}

RecallSequence make_recall(const RecallShape& shape, RecallSplit split, uint64_t seed, uint64_t index) {
  const uint64_t key = random_u64(random_u64(seed, 0x6D716172, static_cast<uint64_t>(split)),  // "mqar"
                                  static_cast<uint64_t>(shape.pairs), index);
  const auto half = static_cast<uint64_t>(shape.vocabulary / 2);
  const int64_t filler = shape.vocabulary - 1;
  RecallSequence sequence{std::vector<int64_t>(static_cast<size_t>(shape.length), filler), {}};
  std::vector<int64_t>& tokens = sequence.tokens;
  for (int64_t i = 0; i < shape.pairs; ++i) {
    tokens[2 * i] = static_cast<int64_t>(permutation_at(key, 0, static_cast<uint64_t>(i), half));
    // Values may repeat: the filler is none of them.
    tokens[2 * i + 1] =
        static_cast<int64_t>(half + random_u64(key, 1, static_cast<uint64_t>(i)) % (half - 1));
  }
  // Weighted draw of slots without replacement (Efraimidis and Spirakis): the largest log(u) / weight.
  const int64_t queries = shape.queries == 0 ? shape.pairs : shape.queries;
  std::vector<std::pair<double, int64_t>> draws;
  for (int64_t slot = 0; slot < shape.slots(); ++slot) {
    const double weight = std::pow(static_cast<double>(slot + 1), kPower - 1);
    draws.emplace_back(std::log1p(-random_uniform(key, 2, static_cast<uint64_t>(slot))) / weight, slot);
  }
  std::partial_sort(draws.begin(), draws.begin() + queries, draws.end(), std::greater<>());
  // Which key stands in which of the slots.
  for (int64_t i = 0; i < queries; ++i) {
    auto pair = static_cast<int64_t>(
        permutation_at(key, 1, static_cast<uint64_t>(i), static_cast<uint64_t>(queries)));
    if (pair >= shape.pairs) {
      pair = static_cast<int64_t>(random_u64(key, 3, static_cast<uint64_t>(pair)) %
                                  static_cast<uint64_t>(shape.pairs));
    }
    const int64_t position = 2 * shape.pairs + 2 * draws[static_cast<size_t>(i)].second;
    tokens[position] = tokens[2 * pair];
    tokens[position + 1] = tokens[2 * pair + 1];
    sequence.values.push_back(position + 1);
  }
  std::sort(sequence.values.begin(), sequence.values.end());
  return sequence;
}

int64_t plain_vocabulary(const tokenizer::Tokenizer& tokenizer) {
  int32_t count = 0;
  while (count < tokenizer.vocabulary_size() && !tokenizer.is_special(count)) ++count;
  return count;
}

std::unique_ptr<const Task> make_recall_task(const std::string& name, const TaskOptions& options,
                                             const tokenizer::Tokenizer& tokenizer) {
  return std::make_unique<RecallTask>(name, options, tokenizer);
}

}  // namespace oryx::evaluation
