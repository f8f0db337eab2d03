// Batches of sequences → next ids: prefill of the prompts, then token by token, each position served by the
// mixer that its schedule names. Ids only: text belongs to the doors above.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "generation/sampling.h"
#include "model/language_model.h"
#include "schedule/schedule.h"

namespace oryx::generation {

struct Request {
  std::vector<int64_t> prompt;  // at least one id
  schedule::Schedule schedule;  // its known length is the prompt's
  int64_t max_tokens = 0;       // at least one
  SamplingOptions sampling = {};
  // Names the sequence in its draws: the same request gives the same tokens alone and in any batch.
  uint64_t sequence = 0;
  // Id sequences that end the text; {{eos}} for an end-of-text token.
  std::vector<std::vector<int64_t>> stops = {};
};

struct Token {
  int64_t id = 0;
  int64_t position = 0;  // in the sequence, prompt included
  // The schedule's mode at the token's own position. The mixer at the position before it predicted it.
  schedule::Mode mode = schedule::Mode::attention;
  double logprob = 0.0;  // see Choice
};

enum class FinishReason { stop, length, cancelled };
std::string_view finish_name(FinishReason reason);  // "stop", "length", "cancelled"

struct Completion {
  std::vector<Token> tokens;  // all that were sampled, the ids of a stop included
  int64_t stop_size = 0;      // how many of the last tokens are the stop
  schedule::ModeSpans modes;  // of the prompt and the tokens
  FinishReason finish = FinishReason::length;
};

// What a caller may watch; each may be empty.
struct Callbacks {
  // After each piece of the prompts of a batch, with its number of tokens.
  std::function<void(int64_t tokens)> on_prompt = {};
  // With every new token of requests[request]; false ends its sequence as a stop does.
  std::function<bool(size_t request, const Token& token)> on_token = {};
  // Polled between the pieces of a prompt and between tokens; true ends all that is not finished.
  std::function<bool()> cancelled = {};
};

struct GeneratorOptions {
  // Tokens of all sequences in one piece of prefill, or twice as many with padding: bounds its memory.
  int64_t piece_tokens = 2048;
  int64_t batch = 64;  // sequences decoded together
  // Their prompts and answers: bounds the caches. A longer sequence runs alone.
  int64_t batch_tokens = std::numeric_limits<int64_t>::max();
};

class Generator {
 public:
  // `vocabulary`: the tokenizer's ids; the model's rows past them are never sampled. The model must outlive
  // the generator. Throws Error when the model has fewer rows.
  Generator(const model::LanguageModel& model, int64_t vocabulary, GeneratorOptions options = {});

  // One completion a request, in order. Prompts of similar length run as one batch, each sequence at its own
  // position. Throws Error on an empty prompt or an id beyond the model's rows, UsageError on a schedule that
  // does not fit or bad options.
  std::vector<Completion> generate(const std::vector<Request>& requests,
                                   const Callbacks& callbacks = {}) const;

 private:
  struct Slot;
  void run_batch(std::vector<Slot> slots, const Callbacks& callbacks) const;
  // The logits [batch, vocabulary] after the prompts; undefined when cancelled.
  at::Tensor prefill(const std::vector<Slot>& slots, model::JointState& state,
                     const Callbacks& callbacks) const;
  at::Tensor step(const std::vector<Slot>& slots, model::JointState& state) const;

  const model::LanguageModel* model_;
  int64_t vocabulary_;
  GeneratorOptions options_;
};

}  // namespace oryx::generation
