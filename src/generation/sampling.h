// From one row of logits to the next token.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace oryx::generation {

// Applied in this order: temperature, top-k, top-p over what top-k left.
struct SamplingOptions {
  double temperature = 0.0;  // 0: the most likely token, ties to the lower id
  int64_t top_k = 0;         // keep the k most likely tokens; 0: all
  double top_p =
      1.0;  // keep the fewest most likely tokens whose probabilities reach this share, at least one
  uint64_t seed = 0;
};

// Throws UsageError naming the option that is out of range.
void validate(const SamplingOptions& options);

struct Choice {
  int64_t id = 0;
  double logprob = 0.0;  // under the model's own distribution: all rows, temperature 1
};

// `logits` [rows of the vocabulary], any floating type and device. Only ids below `vocabulary` are chosen:
// the rows past the tokenizer's ids are padding. The draw is a pure function of the logits and of (seed,
// sequence, position), whatever else is generated beside it. Throws Error where a logit is not a number.
Choice choose(const at::Tensor& logits, int64_t vocabulary, const SamplingOptions& options, uint64_t sequence,
              uint64_t position);

// The most likely token of every row of `logits` [n, rows of the vocabulary], as choose() at temperature 0
// gives it, worked out on the device of the logits. `positions` [n] are for messages.
std::vector<Choice> choose_most_likely(const at::Tensor& logits, int64_t vocabulary,
                                       const std::vector<int64_t>& positions);

}  // namespace oryx::generation
