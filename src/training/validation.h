// The loss on held-out sequences, one figure for each mode that the model can run in.
#pragma once

#include <atomic>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "model/language_model.h"
#include "training/data.h"
#include "training/process_group.h"
#include "training/recipe.h"

namespace oryx::training {

class Validation {
 public:
  // None where the recipe names no validation data. Throws Error for data that SequenceSource refuses, or
  // that another tokenizer made than `tokenizer`, the training data's.
  static std::optional<Validation> create(const Recipe& recipe, const std::string& tokenizer);

  // Mean loss per token, in nats: "attention" and "linear" for a switchable model ("mixed" too where the
  // recipe asks for it), the one mode of a baseline, "hybrid" for a static hybrid. Always the same sequences,
  // spread evenly over the data. Empty when `stop` was set meanwhile. With a group every rank computes its
  // share and all get the result; one that was stopped stops all.
  std::map<std::string, double> losses(const model::LanguageModel& model, const std::atomic<bool>& stop,
                                       ProcessGroup* group = nullptr) const;

  DataIdentity identity() const { return source_.identity(); }

 private:
  // Of the share's sequences, in the order of kinds_. Cut short by `stop`.
  std::vector<double> sums(const model::LanguageModel& model, Share share, const std::atomic<bool>& stop,
                           bool quiet) const;

  Validation(const Recipe& recipe, SequenceSource source);

  Recipe recipe_;
  SequenceSource source_;
  std::vector<int64_t> sequences_;
  std::vector<std::string> kinds_;
};

}  // namespace oryx::training
