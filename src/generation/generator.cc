#include "generation/generator.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace oryx::generation {

// One sequence that is being generated.
struct Generator::Slot {
  size_t index = 0;  // of the request
  const Request* request = nullptr;
  Completion* completion = nullptr;
  schedule::ModeSpans modes;  // of the prompt and all tokens there may be
  int64_t next = 0;           // what the sequence goes on with

  int64_t prompt_size() const { return static_cast<int64_t>(request->prompt.size()); }
  int64_t most_tokens() const { return prompt_size() + request->max_tokens; }

  // Takes in the next token; true when it ends the sequence.
  bool take(const Token& token, const Callbacks& callbacks) {
    completion->tokens.push_back(token);
    if (completion->tokens.size() == static_cast<size_t>(request->max_tokens)) {
      completion->finish = FinishReason::length;
    }
    completion->stop_size = matched_stop();
    const bool wanted = !callbacks.on_token || callbacks.on_token(index, token);
    if (completion->stop_size > 0 || !wanted) {
      completion->finish = FinishReason::stop;
      return true;
    }
    return completion->tokens.size() == static_cast<size_t>(request->max_tokens);
  }

  // The size of the longest stop that the tokens end with, or 0.
  int64_t matched_stop() const {
    const std::vector<Token>& tokens = completion->tokens;
    size_t longest = 0;
    for (const std::vector<int64_t>& stop : request->stops) {
      if (stop.size() <= longest || stop.size() > tokens.size()) continue;
      const bool equal =
          std::equal(stop.begin(), stop.end(), tokens.end() - static_cast<std::ptrdiff_t>(stop.size()),
                     [](int64_t id, const Token& token) { return id == token.id; });
      if (equal) longest = stop.size();
    }
    return static_cast<int64_t>(longest);
  }
};

std::string_view finish_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::cancelled:
      return "cancelled";
  }
  return "";
}

Generator::Generator(const model::LanguageModel& model, int64_t vocabulary, GeneratorOptions options)
    : model_(&model), vocabulary_(vocabulary), options_(options) {
  expect(vocabulary > 0 && vocabulary <= model.config().vocabulary,
         "the tokenizer has {} ids, the model's vocabulary {} rows: expected at least as many rows as ids",
         vocabulary, model.config().vocabulary);
}

std::vector<Completion> Generator::generate(const std::vector<Request>& requests,
                                            const Callbacks& callbacks) const {
  const c10::NoGradGuard no_grad;
  std::vector<Completion> completions(requests.size());
  std::vector<Slot> slots;
  for (size_t i = 0; i < requests.size(); ++i) {
    const Request& request = requests[i];
    expect(!request.prompt.empty(), "the prompt is empty: expected at least one token");
    if (request.max_tokens < 1) fail_usage("max-tokens is {}: expected at least 1", request.max_tokens);
    validate(request.sampling);
    const auto known = static_cast<int64_t>(request.prompt.size());
    slots.push_back(
        {i, &request, &completions[i], request.schedule.spans(known, known + request.max_tokens)});
  }
  std::stable_sort(slots.begin(), slots.end(),
                   [](const Slot& a, const Slot& b) { return a.prompt_size() < b.prompt_size(); });
  // A longer prompt joins where reading what it has more, token by token, takes fewer steps than its answer
  // alone.
  std::vector<Slot> batch;
  int64_t longest = 0;
  for (Slot& slot : slots) {
    longest = std::max(longest, slot.most_tokens());
    const auto rows = static_cast<int64_t>(batch.size()) + 1;
    const bool joins = !batch.empty() && rows <= options_.batch && longest <= options_.batch_tokens / rows &&
                       slot.prompt_size() - batch.back().prompt_size() < slot.request->max_tokens;
    if (!joins && !batch.empty()) {
      run_batch(std::exchange(batch, {}), callbacks);
      longest = slot.most_tokens();
    }
    batch.push_back(std::move(slot));
  }
  if (!batch.empty()) run_batch(std::move(batch), callbacks);
  return completions;
}

void Generator::run_batch(std::vector<Slot> slots, const Callbacks& callbacks) const {
  const auto finish = [](Slot& slot) {
    const auto length = static_cast<int64_t>(slot.request->prompt.size() + slot.completion->tokens.size());
    slot.completion->modes = schedule::cut(slot.modes, 0, length);
  };
  auto state = model_->empty_state(static_cast<int64_t>(slots.size()));
  at::Tensor logits = prefill(slots, state, callbacks);
  while (logits.defined()) {
    const int64_t position = state.position();
    const bool is_greedy = std::all_of(
        slots.begin(), slots.end(), [](const Slot& slot) { return slot.request->sampling.temperature == 0; });
    std::vector<Choice> most_likely;
    if (is_greedy) most_likely = choose_most_likely(logits, vocabulary_, static_cast<uint64_t>(position));
    std::vector<int64_t> remaining;
    for (size_t row = 0; row < slots.size(); ++row) {
      Slot& slot = slots[row];
      if (position < slot.prompt_size()) {
        slot.next = slot.request->prompt[position];
        remaining.push_back(static_cast<int64_t>(row));
        continue;
      }
      const Choice choice =
          is_greedy ? most_likely[row]
                    : choose(logits[static_cast<int64_t>(row)], vocabulary_, slot.request->sampling,
                             slot.request->sequence, static_cast<uint64_t>(position));
      const Token token{choice.id, position, schedule::cut(slot.modes, position, position + 1)[0].mode,
                        choice.logprob};
      slot.next = choice.id;
      if (slot.take(token, callbacks)) {
        finish(slot);
      } else {
        remaining.push_back(static_cast<int64_t>(row));
      }
    }
    if (remaining.empty()) return;
    if (remaining.size() < slots.size()) {
      state = state.select(at::tensor(remaining, at::kLong));
      std::vector<Slot> kept;
      for (const int64_t row : remaining) kept.push_back(std::move(slots[row]));
      slots = std::move(kept);
    }
    if (callbacks.cancelled && callbacks.cancelled()) break;
    logits = step(slots, state);
    const auto reading = std::count_if(slots.begin(), slots.end(),
                                       [&](const Slot& slot) { return position < slot.prompt_size(); });
    if (reading > 0 && callbacks.on_prompt) callbacks.on_prompt(reading);
  }
  for (Slot& slot : slots) {
    slot.completion->finish = FinishReason::cancelled;
    finish(slot);
  }
}

at::Tensor Generator::prefill(const std::vector<Slot>& slots, model::JointState& state,
                              const Callbacks& callbacks) const {
  const auto batch = static_cast<int64_t>(slots.size());
  const int64_t length = slots.front().prompt_size();  // of the shortest
  at::Tensor tokens = at::empty({batch, length}, at::kLong);
  for (int64_t row = 0; row < batch; ++row) {
    std::copy_n(slots[row].request->prompt.begin(), length,
                tokens.mutable_data_ptr<int64_t>() + row * length);
  }
  tokens = tokens.to(model_->device());
  const int64_t piece = std::max<int64_t>(1, options_.piece_tokens / batch);
  at::Tensor logits;
  for (int64_t begin = 0; begin < length; begin += piece) {
    if (callbacks.cancelled && callbacks.cancelled()) return {};
    const int64_t end = std::min(length, begin + piece);
    logits = last_logits(tokens.slice(1, begin, end), slots, state, end == length);
    if (callbacks.on_prompt) callbacks.on_prompt((end - begin) * batch);
  }
  return logits;
}

at::Tensor Generator::step(const std::vector<Slot>& slots, model::JointState& state) const {
  std::vector<int64_t> last;
  for (const Slot& slot : slots) last.push_back(slot.next);
  return last_logits(at::tensor(last, at::kLong).unsqueeze(1).to(model_->device()), slots, state, true);
}

at::Tensor Generator::last_logits(const at::Tensor& tokens, const std::vector<Slot>& slots,
                                  model::JointState& state, bool wanted) const {
  const int64_t begin = state.position();
  std::vector<schedule::ModeSpans> spans;
  for (const Slot& slot : slots) spans.push_back(schedule::cut(slot.modes, begin, begin + tokens.size(1)));
  // One schedule for all lets the model cut it once.
  if (std::all_of(spans.begin(), spans.end(), [&](const auto& other) { return other == spans.front(); })) {
    spans.resize(1);
  }
  const at::Tensor hidden = model_->hidden(tokens, spans, &state);
  if (!wanted) return {};
  return model_->logits(hidden.view({tokens.size(0), tokens.size(1), -1}).select(1, -1).contiguous());
}

}  // namespace oryx::generation
