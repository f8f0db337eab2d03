#include "training/validation.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "base/error.h"
#include "base/progress.h"

namespace oryx::training {

namespace {

schedule::ModeSpans spans_of(const Recipe& recipe, const std::string& kind, int64_t sequence) {
  if (kind == "mixed") return recipe.training_spans(0, sequence);
  const bool linear = kind == "linear";
  return {{0, recipe.data.sequence_length, linear ? schedule::Mode::linear : schedule::Mode::attention}};
}

}  // namespace

std::optional<Validation> Validation::create(const Recipe& recipe, const std::string& tokenizer) {
  if (recipe.data.validation.empty()) return std::nullopt;
  SequenceSource source(recipe.data.validation, recipe.data.sequence_length, recipe.model.vocabulary,
                        "data.validation");
  expect(source.tokenizer() == tokenizer, "data.validation was made with tokenizer {}, data.train with {}",
         source.tokenizer(), tokenizer);
  return Validation(recipe, std::move(source));
}

Validation::Validation(const Recipe& recipe, SequenceSource source)
    : recipe_(recipe), source_(std::move(source)) {
  const int64_t wanted = recipe.training.validation_sequences;
  const int64_t count = wanted > 0 ? std::min(wanted, source_.count()) : source_.count();
  for (int64_t i = 0; i < count; ++i) sequences_.push_back(i * source_.count() / count);
  if (recipe.model.is_switchable()) {
    kinds_ = {"attention", "linear"};
    if (recipe.training.validation_mixed) kinds_.push_back("mixed");
  } else if (recipe.model.hybrid != "none") {
    kinds_ = {"hybrid"};
  } else {
    kinds_ = {recipe.model.has_mode(schedule::Mode::attention) ? "attention" : "linear"};
  }
}

std::map<std::string, double> Validation::losses(const model::LanguageModel& model,
                                                 const std::atomic<bool>& stop) const {
  const at::NoGradGuard no_grad;
  const int64_t length = source_.length(), count = static_cast<int64_t>(sequences_.size());
  ProgressBar bar(count * length * static_cast<int64_t>(kinds_.size()), "validation", {"tok"});
  std::map<std::string, double> sums;
  for (int64_t begin = 0; begin < count; begin += recipe_.training.micro_batch) {
    const int64_t size = std::min(recipe_.training.micro_batch, count - begin);
    const std::vector<int64_t> indices(sequences_.begin() + begin, sequences_.begin() + begin + size);
    const at::Tensor tokens = source_.read(indices);
    const at::Tensor targets = tokens.narrow(1, 1, length).reshape({size * length}).to(model.device());
    for (const std::string& kind : kinds_) {
      if (stop) return {};
      std::vector<schedule::ModeSpans> spans;
      for (const int64_t index : indices) spans.push_back(spans_of(recipe_, kind, index));
      const at::Tensor hidden = model.hidden(tokens.narrow(1, 0, length), spans);
      sums[kind] += model.loss(hidden, targets, 1).second.sum(at::kDouble).item<double>();
      bar.advance(size * length);
    }
  }
  for (auto& [kind, sum] : sums) sum /= static_cast<double>(count * length);
  return sums;
}

}  // namespace oryx::training
