#include "evaluation/language_tasks.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "base/error.h"
#include "evaluation/candidates.h"
#include "evaluation/for_items.h"
#include "evaluation/harness_text.h"
#include "evaluation/statistics.h"
#include "evaluation/task_data.h"
#include "formats/file.h"

namespace oryx::evaluation {

namespace {

using tokenizer::Tokenizer;

// Of the first of equals, as numpy.argmax.
int64_t argmax(const std::vector<double>& values) {
  return std::max_element(values.begin(), values.end()) - values.begin();
}

class ContinuationTask final : public Task {
 public:
  ContinuationTask(const std::string& name, const TaskOptions& options, const Tokenizer& tokenizer)
      : Task(name, "language") {
    for (const Record& record : read_records(data_file(name, options, name + ".jsonl"), options.limit)) {
      items_.push_back({make_candidate(tokenizer, record.text("context", /*may_be_empty=*/true),
                                       record.text("continuation"), options, record.where())});
    }
  }

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }

  std::optional<TaskResult> run(const ScheduleForm& schedule, const Runner& runner) const override {
    TaskResult result{.items = items(), .main = "acc"};
    const auto scores = score_candidates(items_, schedule, true, /*greedy=*/true, runner, result);
    if (!scores) return std::nullopt;
    std::vector<double> log_likelihoods(items_.size()), greedy(items_.size());
    result.records.resize(items_.size());
    for_items(items_.size(), [&](size_t i) {
      const SequenceScore& score = scores->items[i][0];
      log_likelihoods[i] = score.sum();
      greedy[i] = score.all_greedy() ? 1 : 0;
      const Candidate& candidate = items_[i][0];
      Table record;
      record.set("id", Value{static_cast<int64_t>(i)});
      record.set("log_likelihood", Value{log_likelihoods[i]});
      record.set("is_greedy", Value{score.all_greedy()});
      record.set("tokens", Value{static_cast<int64_t>(candidate.tokens.size())});
      record.set("continuation_tokens",
                 Value{static_cast<int64_t>(candidate.tokens.size()) - candidate.first});
      result.records[i] = std::move(record);
    });
    result.metrics = {mean_metric("acc", greedy), perplexity_metric("ppl", log_likelihoods)};
    return result;
  }

 private:
  std::vector<std::vector<Candidate>> items_;
};

// Several sequences an item, one of them the right one.
class ChoiceTask : public Task {
 public:
  ChoiceTask(const std::string& name, std::string main) : Task(name, "language"), main_(std::move(main)) {}

  int64_t items() const override { return static_cast<int64_t>(items_.size()); }

  std::optional<TaskResult> run(const ScheduleForm& schedule, const Runner& runner) const override {
    TaskResult result{.items = items(), .main = main_};
    const auto scores = score_candidates(items_, schedule, true, /*greedy=*/false, runner, result);
    if (!scores) return std::nullopt;
    std::vector<double> right(items_.size()), right_by_byte(is_normalised() ? items_.size() : 0);
    result.records.resize(items_.size());
    for_items(items_.size(), [&](size_t i) {
      std::vector<double> log_likelihoods, by_byte;
      std::vector<int64_t> tokens, continuation_tokens;
      for (size_t c = 0; c < items_[i].size(); ++c) {
        const Candidate& candidate = items_[i][c];
        log_likelihoods.push_back(scores->items[i][c].sum());
        tokens.push_back(static_cast<int64_t>(candidate.tokens.size()));
        continuation_tokens.push_back(tokens.back() - candidate.first);
        if (is_normalised()) by_byte.push_back(log_likelihoods[c] / static_cast<double>(bytes_[i][c]));
      }
      Table record;
      record.set("id", Value{static_cast<int64_t>(i)});
      record.set("gold", Value{golds_[i]});
      record.set("log_likelihoods", Value{to_array(log_likelihoods)});
      if (is_normalised()) {
        record.set("bytes", Value{to_array(bytes_[i])});
        record.set("characters", Value{to_array(characters_[i])});
      }
      record.set("tokens", Value{to_array(tokens)});
      record.set("continuation_tokens", Value{to_array(continuation_tokens)});
      right[i] = argmax(log_likelihoods) == golds_[i] ? 1 : 0;
      record.set("acc", Value{right[i] == 1});
      if (is_normalised()) {
        right_by_byte[i] = argmax(by_byte) == golds_[i] ? 1 : 0;
        record.set("acc_norm", Value{right_by_byte[i] == 1});
      }
      result.records[i] = std::move(record);
    });
    result.metrics = {mean_metric("acc", right)};
    if (is_normalised()) result.metrics.push_back(mean_metric("acc_norm", right_by_byte));
    return result;
  }

 protected:
  bool is_normalised() const { return !bytes_.empty(); }

  std::string main_;
  std::vector<std::vector<Candidate>> items_;
  std::vector<int64_t> golds_;
  // Of each choice without the space that sets it off, where scores are normalised by them.
  std::vector<std::vector<int64_t>> bytes_, characters_;
};

class ContinuationChoiceTask final : public ChoiceTask {
 public:
  ContinuationChoiceTask(const std::string& name, const std::string& main, const TaskOptions& options,
                         const Tokenizer& tokenizer)
      : ChoiceTask(name, main) {
    for (const Record& record : read_records(data_file(name, options, name + ".jsonl"), options.limit)) {
      const std::string context = record.text("context", /*may_be_empty=*/true);
      const std::vector<std::string> choices = record.texts("choices", 2);
      std::vector<Candidate> candidates;
      std::vector<int64_t> bytes, characters;
      for (const std::string& choice : choices) {
        candidates.push_back(make_candidate(tokenizer, context, choice, options, record.where()));
        const std::string_view text = std::string_view(choice).substr(choice.starts_with(' ') ? 1 : 0);
        expect(!text.empty(), "{}: a choice is a lone space", record.where());
        bytes.push_back(static_cast<int64_t>(text.size()));
        characters.push_back(count_characters(text));
      }
      golds_.push_back(record.index("gold", static_cast<int64_t>(choices.size())));
      items_.push_back(std::move(candidates));
      bytes_.push_back(std::move(bytes));
      characters_.push_back(std::move(characters));
    }
  }
};

class ContextChoiceTask final : public ChoiceTask {
 public:
  ContextChoiceTask(const std::string& name, const TaskOptions& options, const Tokenizer& tokenizer)
      : ChoiceTask(name, "acc") {
    for (const Record& record : read_records(data_file(name, options, name + ".jsonl"), options.limit)) {
      const std::vector<std::string> contexts = record.texts("contexts", 2);
      const std::string continuation = record.text("continuation");
      std::vector<Candidate> candidates;
      for (const std::string& context : contexts) {
        candidates.push_back(make_candidate(tokenizer, context, continuation, options, record.where()));
      }
      golds_.push_back(record.index("gold", static_cast<int64_t>(contexts.size())));
      items_.push_back(std::move(candidates));
    }
  }
};

class RollingTask final : public Task {
 public:
  RollingTask(const std::string& name, const TaskOptions& options, const Tokenizer& tokenizer)
      : Task(name, "language") {
    const std::string path = data_file(name, options, name + "_test.txt");
    expect(std::filesystem::is_regular_file(path), "no such task file: {}", path);
    std::vector<std::string> pages = wikitext_pages(formats::read_file(path));
    expect(!pages.empty(), "{} holds no text", path);
    if (options.limit) pages.resize(std::min(pages.size(), static_cast<size_t>(*options.limit)));
    for (size_t i = 0; i < pages.size(); ++i) {
      const std::vector<int32_t> ids = tokenizer.encode(wikitext_detokenize(pages[i]), false);
      pages_.push_back({static_cast<double>(count_words(pages[i])), static_cast<double>(pages[i].size()),
                        static_cast<int64_t>(ids.size())});
      for (const Window& window : rolling_windows(static_cast<int64_t>(ids.size()), options.max_length)) {
        Candidate candidate;
        if (window.begin < 0) candidate.tokens.push_back(tokenizer.end_of_text());
        candidate.tokens.insert(candidate.tokens.end(), ids.begin() + std::max<int64_t>(0, window.begin),
                                ids.begin() + window.end);
        candidate.first = window.first - window.begin;
        windows_.push_back({std::move(candidate)});
        page_of_window_.push_back(i);
      }
    }
  }

  int64_t items() const override { return static_cast<int64_t>(pages_.size()); }
  int64_t steps() const override { return static_cast<int64_t>(windows_.size()); }
  bool has_query() const override { return false; }

  std::optional<TaskResult> run(const ScheduleForm& schedule, const Runner& runner) const override {
    TaskResult result{.items = items(), .main = "word_perplexity"};
    const auto scores = score_candidates(windows_, schedule, has_query(), /*greedy=*/false, runner, result);
    if (!scores) return std::nullopt;
    std::vector<double> log_likelihoods(pages_.size()), words, bytes;
    for (size_t w = 0; w < windows_.size(); ++w) {
      log_likelihoods[page_of_window_[w]] += scores->items[w][0].sum();
    }
    for (size_t i = 0; i < pages_.size(); ++i) {
      words.push_back(pages_[i].words);
      bytes.push_back(pages_[i].bytes);
      Table record;
      record.set("id", Value{static_cast<int64_t>(i)});
      record.set("log_likelihood", Value{log_likelihoods[i]});
      record.set("words", Value{static_cast<int64_t>(words[i])});
      record.set("bytes", Value{static_cast<int64_t>(bytes[i])});
      record.set("tokens", Value{pages_[i].tokens});
      result.records.push_back(std::move(record));
    }
    result.metrics = {weighted_perplexity_metric("word_perplexity", log_likelihoods, words),
                      weighted_perplexity_metric("byte_perplexity", log_likelihoods, bytes),
                      bits_metric("bits_per_byte", log_likelihoods, bytes)};
    return result;
  }

 private:
  struct Page {
    double words, bytes;  // of the page as it stands in the file
    int64_t tokens;       // of its detokenized text
  };
  std::vector<Page> pages_;
  std::vector<std::vector<Candidate>> windows_;
  std::vector<size_t> page_of_window_;
};

}  // namespace

std::unique_ptr<const Task> make_continuation_task(const std::string& name, const TaskOptions& options,
                                                   const Tokenizer& tokenizer) {
  return std::make_unique<ContinuationTask>(name, options, tokenizer);
}

std::unique_ptr<const Task> make_choice_task(const std::string& name, const std::string& main,
                                             const TaskOptions& options, const Tokenizer& tokenizer) {
  return std::make_unique<ContinuationChoiceTask>(name, main, options, tokenizer);
}

std::unique_ptr<const Task> make_context_task(const std::string& name, const TaskOptions& options,
                                              const Tokenizer& tokenizer) {
  return std::make_unique<ContextChoiceTask>(name, options, tokenizer);
}

std::unique_ptr<const Task> make_rolling_task(const std::string& name, const TaskOptions& options,
                                              const Tokenizer& tokenizer) {
  return std::make_unique<RollingTask>(name, options, tokenizer);
}

}  // namespace oryx::evaluation
