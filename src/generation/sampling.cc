#include "generation/sampling.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/random.h"

namespace oryx::generation {

namespace {

constexpr uint64_t kSamplingStream = 0x73616D706C696E67;  // "sampling": apart from the other uses of a seed

// The fewest leading ids whose probabilities reach `mass`.
size_t nucleus(std::span<const int64_t> ids, std::span<const double> probabilities, double mass) {
  double reached = 0;
  for (size_t count = 0; count < ids.size(); ++count) {
    if (count > 0 && reached >= mass) return count;
    reached += probabilities[ids[count]];
  }
  return ids.size();
}

// The ids that top-k and top-p keep, most likely first, ties to the lower id. A heap hands them out one by
// one: few are wanted, and sorting the whole vocabulary would cost more than all of them.
std::vector<int64_t> most_likely(std::span<const double> probabilities, int64_t top_k, double top_p) {
  const auto less_likely = [&](int64_t a, int64_t b) {
    return probabilities[a] != probabilities[b] ? probabilities[a] < probabilities[b] : a > b;
  };
  std::vector<int64_t> heap(probabilities.size());
  std::iota(heap.begin(), heap.end(), 0);
  std::make_heap(heap.begin(), heap.end(), less_likely);

  const bool bounded = top_k > 0 && top_k < static_cast<int64_t>(heap.size());
  const size_t limit = bounded ? top_k : heap.size();
  // Under top-k the share that top-p speaks of is that of the k tokens, known only once they are.
  const double total = std::accumulate(probabilities.begin(), probabilities.end(), 0.0);
  const double enough = bounded || top_p >= 1 ? std::numeric_limits<double>::infinity() : top_p * total;
  std::vector<int64_t> kept;
  double mass = 0;
  while (kept.size() < limit && (kept.empty() || mass < enough)) {
    std::pop_heap(heap.begin(), heap.end(), less_likely);
    kept.push_back(heap.back());
    heap.pop_back();
    mass += probabilities[kept.back()];
  }
  if (bounded && top_p < 1) kept.resize(nucleus(kept, probabilities, top_p * mass));
  return kept;
}

// The id at which the running sum of probabilities passes `uniform` of their total.
int64_t invert(std::span<const int64_t> ids, std::span<const double> probabilities, double uniform) {
  double total = 0;
  for (const int64_t id : ids) total += probabilities[id];
  double reached = 0;
  int64_t last = ids.front();
  for (const int64_t id : ids) {
    if (probabilities[id] <= 0) continue;
    reached += probabilities[id];
    last = id;
    if (reached > uniform * total) break;
  }
  return last;
}

int64_t draw(std::span<const double> probabilities, const SamplingOptions& options, double uniform) {
  if (options.top_p < 1 ||
      (options.top_k > 0 && options.top_k < static_cast<int64_t>(probabilities.size()))) {
    return invert(most_likely(probabilities, options.top_k, options.top_p), probabilities, uniform);
  }
  std::vector<int64_t> all(probabilities.size());
  std::iota(all.begin(), all.end(), 0);
  return invert(all, probabilities, uniform);
}

// Logits in the type in which probabilities are worked out.
at::Tensor widened(const at::Tensor& logits) {
  return logits.to(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

Choice checked(Choice choice, uint64_t position) {
  expect(!std::isnan(choice.logprob), "the model's logits at position {} are not numbers", position);
  return choice;
}

}  // namespace

void validate(const SamplingOptions& options) {
  if (!(options.temperature >= 0 && std::isfinite(options.temperature))) {
    fail_usage("temperature is {}: expected 0 (greedy) or a positive number", options.temperature);
  }
  if (options.top_k < 0)
    fail_usage("top-k is {}: expected 0 (all tokens) or a positive number", options.top_k);
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    fail_usage("top-p is {}: expected a number above 0 and up to 1", options.top_p);
  }
}

Choice choose(const at::Tensor& logits, int64_t vocabulary, const SamplingOptions& options, uint64_t sequence,
              uint64_t position) {
  expect(logits.dim() == 1 && vocabulary > 0 && vocabulary <= logits.size(0),
         "expected logits of at least {} ids, got {} dimensions of {} values", vocabulary, logits.dim(),
         logits.numel());
  if (options.temperature == 0) {
    return choose_most_likely(logits.unsqueeze(0), vocabulary, {static_cast<int64_t>(position)})[0];
  }
  const at::Tensor row = widened(logits.cpu()).contiguous();
  const at::Tensor log_probabilities = at::log_softmax(row, 0);
  const at::Tensor allowed = row.narrow(0, 0, vocabulary);

  // The largest logit goes first: a temperature near zero must not overflow.
  const at::Tensor probabilities =
      at::softmax((allowed - allowed.max()).to(at::kDouble) / options.temperature, 0);
  const double uniform = random_uniform(random_u64(options.seed, kSamplingStream, sequence), 0, position);
  const int64_t id =
      draw({probabilities.const_data_ptr<double>(), static_cast<size_t>(vocabulary)}, options, uniform);
  return checked({id, log_probabilities[id].item<double>()}, position);
}

std::vector<Choice> choose_most_likely(const at::Tensor& logits, int64_t vocabulary,
                                       const std::vector<int64_t>& positions) {
  expect(logits.dim() == 2 && vocabulary > 0 && vocabulary <= logits.size(1),
         "expected logits [n, at least {}], got {} dimensions of {} values", vocabulary, logits.dim(),
         logits.numel());
  const at::Tensor wide = widened(logits);
  const at::Tensor best = wide.narrow(1, 0, vocabulary).argmax(1, /*keepdim=*/true);
  const at::Tensor logprobs = at::log_softmax(wide, 1).gather(1, best).to(at::kCPU, at::kDouble),
                   ids = best.cpu();
  std::vector<Choice> choices;
  for (int64_t row = 0; row < ids.size(0); ++row) {
    choices.push_back(checked({ids.const_data_ptr<int64_t>()[row], logprobs.const_data_ptr<double>()[row]},
                              static_cast<uint64_t>(positions[row])));
  }
  return choices;
}

}  // namespace oryx::generation
