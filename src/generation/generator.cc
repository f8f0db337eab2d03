#include "generation/generator.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <map>
#include <utility>

#include "base/error.h"

namespace oryx::generation {

// One sequence that is being generated.
struct Generator::Slot {
  size_t index = 0;  // of the request
  const Request* request = nullptr;
  Completion* completion = nullptr;
  schedule::ModeSpans modes;  // of the prompt and all tokens there may be

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
  // The sequences of one joint state share their position.
  std::map<size_t, std::vector<Slot>> by_length;
  for (size_t i = 0; i < requests.size(); ++i) {
    const Request& request = requests[i];
    expect(!request.prompt.empty(), "the prompt is empty: expected at least one token");
    if (request.max_tokens < 1) fail_usage("max-tokens is {}: expected at least 1", request.max_tokens);
    validate(request.sampling);
    const auto known = static_cast<int64_t>(request.prompt.size());
    by_length[request.prompt.size()].push_back(
        {i, &request, &completions[i], request.schedule.spans(known, known + request.max_tokens)});
  }
  for (auto& [length, slots] : by_length) {
    for (size_t begin = 0; begin < slots.size(); begin += options_.batch) {
      const size_t end = std::min(slots.size(), begin + options_.batch);
      run_batch({slots.begin() + begin, slots.begin() + end}, callbacks);
    }
  }
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
    std::vector<int64_t> remaining;
    for (size_t row = 0; row < slots.size(); ++row) {
      const Slot& slot = slots[row];
      const int64_t position = state.position();
      const Choice choice = choose(logits[static_cast<int64_t>(row)], vocabulary_, slot.request->sampling,
                                   slot.request->sequence, static_cast<uint64_t>(position));
      const Token token{choice.id, position, schedule::cut(slot.modes, position, position + 1)[0].mode,
                        choice.logprob};
      if (slots[row].take(token, callbacks)) {
        finish(slots[row]);
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
  }
  for (Slot& slot : slots) {
    slot.completion->finish = FinishReason::cancelled;
    finish(slot);
  }
}

at::Tensor Generator::prefill(const std::vector<Slot>& slots, model::JointState& state,
                              const Callbacks& callbacks) const {
  const auto batch = static_cast<int64_t>(slots.size());
  const auto length = static_cast<int64_t>(slots.front().request->prompt.size());
  at::Tensor tokens = at::empty({batch, length}, at::kLong);
  for (int64_t row = 0; row < batch; ++row) {
    const std::vector<int64_t>& prompt = slots[row].request->prompt;
    std::copy(prompt.begin(), prompt.end(), tokens.mutable_data_ptr<int64_t>() + row * length);
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
  for (const Slot& slot : slots) last.push_back(slot.completion->tokens.back().id);
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
