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

std::vector<double> Validation::sums(const model::LanguageModel& model, Share share,
                                     const std::atomic<bool>& stop, bool quiet) const {
  const at::NoGradGuard no_grad;
  const int64_t length = source_.length();
  std::optional<ProgressBar> bar;
  if (!quiet) {
    bar.emplace(share.size() * length * static_cast<int64_t>(kinds_.size()), "validation",
                ProgressOptions{"tok"});
  }
  std::vector<double> sums(kinds_.size(), 0.0);
  for (int64_t begin = share.begin; begin < share.end; begin += recipe_.training.micro_batch) {
    const int64_t size = std::min(recipe_.training.micro_batch, share.end - begin);
    const std::vector<int64_t> indices(sequences_.begin() + begin, sequences_.begin() + begin + size);
    const at::Tensor tokens = source_.read(indices);
    const at::Tensor targets = tokens.narrow(1, 1, length).reshape({size * length}).to(model.device());
    for (size_t k = 0; k < kinds_.size(); ++k) {
      if (stop) return sums;
      std::vector<schedule::ModeSpans> spans;
      for (const int64_t index : indices) spans.push_back(spans_of(recipe_, kinds_[k], index));
      const at::Tensor hidden = model.hidden(tokens.narrow(1, 0, length), spans);
      sums[k] += model.loss(hidden, targets, 1).second.sum(at::kDouble).item<double>();
      if (bar) bar->advance(size * length);
    }
  }
  return sums;
}

std::map<std::string, double> Validation::losses(const model::LanguageModel& model,
                                                 const std::atomic<bool>& stop, ProcessGroup* group) const {
  const int64_t count = static_cast<int64_t>(sequences_.size());
  const Share share = group ? share_of(count, group->rank(), group->size()) : Share{0, count};
  std::vector<double> totals = sums(model, share, stop, group && !group->leads());
  bool stopped = stop;
  if (group) {
    totals.push_back(stopped);
    const at::Tensor all = at::tensor(totals, at::kDouble).to(group->device());
    group->all_reduce(all).finish();
    const at::Tensor on_host = all.cpu();
    for (size_t k = 0; k < totals.size(); ++k) totals[k] = on_host.const_data_ptr<double>()[k];
    stopped = totals.back() > 0;
  }
  if (stopped) return {};
  std::map<std::string, double> losses;
  for (size_t k = 0; k < kinds_.size(); ++k) {
    losses[kinds_[k]] = totals[k] / static_cast<double>(count * source_.length());
  }
  return losses;
}

}  // namespace oryx::training
