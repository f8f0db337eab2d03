#include <algorithm>
#include <filesystem>
#include <map>
#include <utility>

#include "base/error.h"
#include "evaluation/needle.h"
#include "evaluation/questions.h"
#include "evaluation/statistics.h"

namespace oryx::evaluation {

namespace {

using tokenizer::Tokenizer;

std::vector<std::string> essay_words(const std::string& task, const TaskOptions& options) {
  if (needle_kind(task).haystack != NeedleKind::Haystack::essay) return {};
  const std::filesystem::path standard = std::filesystem::path(options.data) / "essay.txt";
  const bool is_there = !options.data.empty() && std::filesystem::exists(standard);
  expect(!options.essay.empty() || is_there, "{} needs the text of essays: pass --essay FILE", task);
  const int64_t longest = *std::max_element(options.needle_lengths.begin(), options.needle_lengths.end());
  return read_words(options.essay.empty() ? standard.string() : options.essay, static_cast<size_t>(longest));
}

class NeedleTask final : public Task {
 public:
  NeedleTask(const std::string& name, const TaskOptions& options, const Tokenizer& tokenizer)
      : Task(name, "needle"),
        kind_(needle_kind(name)),
        essay_(essay_words(name, options)),
        max_new_tokens_(options.max_new_tokens) {
    const int64_t samples = std::min(options.needle_samples, options.limit.value_or(options.needle_samples));
    for (const int64_t length : options.needle_lengths) {
      int64_t units = fitting_units(length, options, tokenizer);
      for (int64_t i = 0; i < samples; ++i) {
        const double depth =
            options.needle_depths[static_cast<size_t>(i) % options.needle_depths.size()] / 100;
        add_sample(length, depth, units, options.seed, static_cast<uint64_t>(i), tokenizer);
      }
    }
  }

  int64_t items() const override { return static_cast<int64_t>(questions_.size()); }

  std::optional<TaskResult> run(const ScheduleForm& schedule, const Runner& runner) const override {
    TaskResult result{.items = items(), .main = "contains"};
    const auto answers = answer_all(questions_, schedule, max_new_tokens_, runner, result);
    if (!answers) return std::nullopt;
    std::map<std::pair<int64_t, double>, std::vector<Answer>> cells;
    for (size_t i = 0; i < questions_.size(); ++i) {
      Table record = answer_record(static_cast<int64_t>(i), questions_[i], (*answers)[i]);
      record.set("length", Value{places_[i].first});
      record.set("depth", Value{places_[i].second});
      result.records.push_back(std::move(record));
      cells[places_[i]].push_back((*answers)[i]);
    }
    for (const auto& [place, group] : cells) {
      const Metric metric = contains_metric(group);
      Table cell;
      cell.set("length", Value{place.first});
      cell.set("depth", Value{place.second});
      cell.set("value", Value{metric.value});
      cell.set("items", Value{static_cast<int64_t>(group.size())});
      result.cells.push_back(std::move(cell));
    }
    result.metrics = {contains_metric(*answers)};
    return result;
  }

 private:
  Question question(int64_t length, double depth, int64_t units, uint64_t seed, uint64_t sample,
                    const Tokenizer& tokenizer) const {
    const NeedleText text = make_needle(kind_, units, depth, essay_, seed, sample);
    // No budget: the haystack is made to fit.
    return make_question(tokenizer, text.context, text.prompt, {text.answer}, INT64_MAX,
                         fmt::format("{} of {} tokens", name(), length));
  }

  bool fits(const Question& question, int64_t length) const {
    return static_cast<int64_t>(question.prompt.size()) + max_new_tokens_ <= length;
  }

  // The most haystack with which the first sample fits.
  int64_t fitting_units(int64_t length, const TaskOptions& options, const Tokenizer& tokenizer) const {
    const auto first_fits = [&](int64_t units) {
      return fits(question(length, 0.5, units, options.seed, 0, tokenizer), length);
    };
    expect(first_fits(kind_.keys),
           "{}: question, needle and {} tokens for the answer take more than the length of {} tokens", name(),
           max_new_tokens_, length);
    // One unit has at least one token.
    int64_t low = kind_.keys, high = length;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (first_fits(middle) ? low : high) = middle;
    }
    return low;
  }

  // Other samples' keys have more tokens: the haystack shrinks until all fits.
  void add_sample(int64_t length, double depth, int64_t units, uint64_t seed, uint64_t sample,
                  const Tokenizer& tokenizer) {
    const int64_t step = kind_.haystack == NeedleKind::Haystack::essay ? 8 : 1;
    Question sized = question(length, depth, units, seed, sample, tokenizer);
    while (!fits(sized, length) && units > 1) {
      units = std::max<int64_t>(1, units - step);
      sized = question(length, depth, units, seed, sample, tokenizer);
    }
    expect(fits(sized, length), "{}: sample {} does not fit into {} tokens", name(), sample, length);
    questions_.push_back(std::move(sized));
    places_.emplace_back(length, depth);
  }

  NeedleKind kind_;
  std::vector<std::string> essay_;
  int64_t max_new_tokens_;
  std::vector<Question> questions_;
  std::vector<std::pair<int64_t, double>> places_;  // length and depth of each
};

}  // namespace

std::unique_ptr<const Task> make_needle_task(const std::string& name, const TaskOptions& options,
                                             const Tokenizer& tokenizer) {
  return std::make_unique<NeedleTask>(name, options, tokenizer);
}

}  // namespace oryx::evaluation
