#include "generation/generator.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>

#include "base/device_copy.h"
#include "base/error.h"

namespace oryx::generation {

// One sequence that is being generated.
struct Generator::Slot {
  size_t index = 0;  // of the request
  const Request* request = nullptr;
  Completion* completion = nullptr;
  schedule::ModeSpans modes;  // of the prompt and all tokens there may be
  int64_t next = 0;           // what the sequence goes on with
  bool is_done = false;       // its row goes on for nothing until the batch is made smaller

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
  // A longer prompt joins where the padding of the others is no more than a piece, and than what they write.
  std::vector<Slot> batch;
  int64_t longest = 0, padding = 0, writing = 0;
  for (Slot& slot : slots) {
    longest = std::max(longest, slot.most_tokens());
    const auto before = static_cast<int64_t>(batch.size()), rows = before + 1;
    if (before > 0) padding += before * (slot.prompt_size() - batch.back().prompt_size());
    const bool joins = before > 0 && rows <= options_.batch && longest <= options_.batch_tokens / rows &&
                       padding <= std::min(options_.piece_tokens, writing);
    if (!joins) {
      if (before > 0) run_batch(std::exchange(batch, {}), callbacks);
      longest = slot.most_tokens();
      padding = writing = 0;
    }
    writing += slot.request->max_tokens;
    batch.push_back(std::move(slot));
  }
  if (!batch.empty()) run_batch(std::move(batch), callbacks);
  return completions;
}

void Generator::run_batch(std::vector<Slot> slots, const Callbacks& callbacks) const {
  const auto finish = [](Slot& slot) {
    const auto length = static_cast<int64_t>(slot.request->prompt.size() + slot.completion->tokens.size());
    slot.completion->modes = schedule::cut(slot.modes, 0, length);
    slot.is_done = true;
  };
  const auto is_done = [](const Slot& slot) { return slot.is_done; };
  auto state = model_->empty_state(static_cast<int64_t>(slots.size()));
  at::Tensor logits = prefill(slots, state, callbacks);
  while (logits.defined()) {
    const std::vector<int64_t> positions = state.positions();
    const bool is_greedy = std::all_of(
        slots.begin(), slots.end(), [](const Slot& slot) { return slot.request->sampling.temperature == 0; });
    std::vector<Choice> most_likely;
    if (is_greedy) most_likely = choose_most_likely(logits, vocabulary_, positions);
    for (size_t row = 0; row < slots.size(); ++row) {
      Slot& slot = slots[row];
      if (slot.is_done) continue;
      const int64_t position = positions[row];
      const Choice choice =
          is_greedy ? most_likely[row]
                    : choose(logits[static_cast<int64_t>(row)], vocabulary_, slot.request->sampling,
                             slot.request->sequence, static_cast<uint64_t>(position));
      const Token token{choice.id, position, schedule::cut(slot.modes, position, position + 1)[0].mode,
                        choice.logprob};
      slot.next = choice.id;
      if (slot.take(token, callbacks)) finish(slot);
    }
    const auto done = std::count_if(slots.begin(), slots.end(), is_done);
    if (done == static_cast<std::ptrdiff_t>(slots.size())) return;
    // A smaller batch is a copy of all caches: worth it only for a good part of the rows.
    if (4 * done >= static_cast<std::ptrdiff_t>(slots.size())) {
      std::vector<int64_t> rows;
      for (size_t row = 0; row < slots.size(); ++row) {
        if (!slots[row].is_done) rows.push_back(static_cast<int64_t>(row));
      }
      state = state.select(at::tensor(rows, at::kLong));
      std::erase_if(slots, is_done);
    }
    if (callbacks.cancelled && callbacks.cancelled()) break;
    logits = step(slots, state);
  }
  for (Slot& slot : slots) {
    if (slot.is_done) continue;
    slot.completion->finish = FinishReason::cancelled;
    finish(slot);
  }
}

at::Tensor Generator::prefill(const std::vector<Slot>& slots, model::JointState& state,
                              const Callbacks& callbacks) const {
  const auto batch = static_cast<int64_t>(slots.size());
  const int64_t shortest = slots.front().prompt_size(), longest = slots.back().prompt_size();
  at::Tensor tokens = at::zeros({batch, longest}, at::kLong);
  std::vector<schedule::ModeSpans> spans;
  for (int64_t row = 0; row < batch; ++row) {
    std::copy(slots[row].request->prompt.begin(), slots[row].request->prompt.end(),
              tokens.mutable_data_ptr<int64_t>() + row * longest);
    spans.push_back(slots[row].modes);
  }
  const at::Tensor ids = copy_to(tokens, model_->device());
  // All read pieces of one length; the last takes what is left of each, at least a token.
  const int64_t piece = std::max<int64_t>(1, options_.piece_tokens / batch);
  int64_t begin = 0;
  for (; begin + piece < shortest; begin += piece) {
    if (callbacks.cancelled && callbacks.cancelled()) return {};
    model_->hidden(ids.slice(1, begin, begin + piece), spans, &state);
    if (callbacks.on_prompt) callbacks.on_prompt(piece * batch);
  }
  if (callbacks.cancelled && callbacks.cancelled()) return {};
  const int64_t time = longest - begin;
  std::vector<int64_t> lengths, last;
  int64_t read = 0;
  for (int64_t row = 0; row < batch; ++row) {
    lengths.push_back(slots[row].prompt_size() - begin);
    last.push_back(row * time + lengths.back() - 1);
    read += lengths.back();
  }
  const at::Tensor hidden = model_->hidden(ids.slice(1, begin, longest), spans, &state, lengths);
  const at::Tensor logits =
      model_->logits(hidden.index_select(0, copy_to(at::tensor(last, at::kLong), model_->device())));
  if (callbacks.on_prompt) callbacks.on_prompt(read);
  return logits;
}

at::Tensor Generator::step(const std::vector<Slot>& slots, model::JointState& state) const {
  std::vector<int64_t> last;
  std::vector<schedule::ModeSpans> spans;
  for (size_t row = 0; row < slots.size(); ++row) {
    last.push_back(slots[row].next);
    const int64_t position = state.positions()[row];
    spans.push_back(slots[row].is_done
                        ? schedule::ModeSpans{{position, position + 1, slots[row].modes.back().mode}}
                        : schedule::cut(slots[row].modes, position, position + 1));
  }
  const at::Tensor tokens = copy_to(at::tensor(last, at::kLong).unsqueeze(1), model_->device());
  return model_->logits(model_->hidden(tokens, spans, &state));
}

}  // namespace oryx::generation
