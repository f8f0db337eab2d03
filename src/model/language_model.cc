#include "model/language_model.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "base/error.h"
#include "base/shapes.h"
#include "model/embedding.h"
#include "model/recompute.h"
#include "operators/cross_entropy/cross_entropy.h"
#include "operators/gated_norm/gated_norm.h"
#include "operators/linear/linear.h"

namespace oryx::model {

namespace {

Piece piece_of(int64_t batch, int64_t time, const JointState* state, const std::vector<int64_t>& lengths,
               bool keeps_state) {
  Piece piece{.batch = batch, .time = time, .positions = {}, .lengths = lengths, .keeps_state = keeps_state};
  piece.positions = state ? state->positions() : std::vector<int64_t>(batch);
  if (lengths.empty()) piece.lengths.assign(batch, time);
  expect(static_cast<int64_t>(piece.lengths.size()) == batch, "[model] expected {} lengths, got {}", batch,
         piece.lengths.size());
  for (const int64_t length : piece.lengths) {
    expect(length >= 1 && length <= time, "[model] expected lengths from 1 to {}, got {}", time, length);
  }
  return piece;
}

// What was left out at the start is missed only later.
void expect_kept(const JointState& state, const Routing& routing) {
  const bool starts = std::all_of(state.positions().begin(), state.positions().end(),
                                  [](int64_t position) { return position == 0; });
  if (starts) return;
  expect(state.next_modes().attention || routing.attention.count == 0,
         "the state was not kept for attention, which the schedule asks for");
  expect(state.next_modes().linear || routing.linear.count == 0,
         "the state was not kept for linear, which the schedule asks for");
}

}  // namespace

LanguageModel::LanguageModel(ModelConfig config, Weights weights, at::ScalarType dtype)
    : config_(std::move(config)), weights_(std::move(weights)), dtype_(dtype) {
  embedding_ = weights_.at("embedding.weight");
  final_norm_ = weights_.at("final_norm.weight");
  for (int64_t n = 0; n < config_.layers; ++n) layers_.emplace_back(config_, n, weights_);
}

LanguageModel LanguageModel::load(const std::filesystem::path& directory, at::ScalarType dtype,
                                  at::Device device) {
  const ModelConfig config = load_config(directory);
  Weights weights = load_weights(directory, config, dtype);
  for (auto& [name, tensor] : weights.entries()) tensor = tensor.to(device);
  return LanguageModel(config, std::move(weights), dtype);
}

at::Device LanguageModel::device() const { return embedding_.device(); }

JointState LanguageModel::empty_state(int64_t batch, NextModes next) const {
  return JointState::empty(config_, batch, dtype_, device(), next);
}

at::Tensor LanguageModel::hidden(const at::Tensor& tokens, const std::vector<schedule::ModeSpans>& spans,
                                 JointState* state, const std::vector<int64_t>& lengths) const {
  return run(tokens, spans, state, lengths, /*keeps_state=*/state != nullptr);
}

at::Tensor LanguageModel::last_hidden(const at::Tensor& tokens, const std::vector<schedule::ModeSpans>& spans,
                                      const JointState& state, const std::vector<int64_t>& lengths) const {
  JointState shallow = state;  // new keys and values go past what the state's caches hold
  return run(tokens, spans, &shallow, lengths, /*keeps_state=*/false);
}

at::Tensor LanguageModel::run(const at::Tensor& tokens, const std::vector<schedule::ModeSpans>& spans,
                              JointState* state, const std::vector<int64_t>& lengths,
                              bool keeps_state) const {
  expect_dimensions("model", "tokens", tokens, 2);
  const int64_t batch = tokens.size(0), time = tokens.size(1);
  expect(batch > 0 && time > 0, "[model] expected at least one token, got tokens [{}, {}]", batch, time);
  expect(state == nullptr || state->batch() == batch, "[model] expected tokens of {} sequences, got {}",
         state ? state->batch() : 0, batch);
  if (tokens.device().is_cpu()) {
    const auto [lowest, highest] = tokens.aminmax();
    const int64_t bad = lowest.item<int64_t>() < 0 ? lowest.item<int64_t>() : highest.item<int64_t>();
    expect(bad >= 0 && bad < config_.vocabulary, "token id {} is outside the model's vocabulary of {}", bad,
           config_.vocabulary);
  }
  const Piece piece = piece_of(batch, time, state, lengths, keeps_state);
  int64_t capacity = time;
  if (state != nullptr) {
    state->make_room(time);
    for (const LayerState& layer : state->layers()) {
      if (layer.key_cache.defined()) capacity = layer.key_cache.size(1);
    }
  }
  const Routing routing = route(config_, spans, piece, capacity, dtype_, device());
  if (state != nullptr) expect_kept(*state, routing);

  at::Tensor ids = tokens.to(device(), at::kLong).reshape({batch * time});
  if (routing.tokens) ids = ids.index_select(0, *routing.tokens);
  at::Tensor residual = embed(embedding_, ids, dtype_);
  at::Tensor normed =
      operators::gated_norm(residual, std::nullopt, layers_[0].input_norm(), config_.norm_eps, "after_gate");
  for (size_t n = 0; n < layers_.size(); ++n) {
    const at::Tensor& next_norm = n + 1 < layers_.size() ? layers_[n + 1].input_norm() : final_norm_;
    if (recompute_layers_ && state == nullptr && residual.requires_grad()) {
      std::tie(residual, normed) = recomputed(
          [layer = &layers_[n], next_norm, routing](const at::Tensor& residual_in,
                                                    const at::Tensor& normed_in) {
            return layer->forward(residual_in, normed_in, next_norm, routing, nullptr);
          },
          residual, normed);
      continue;
    }
    std::tie(residual, normed) =
        layers_[n].forward(residual, normed, next_norm, routing, state ? &state->layers()[n] : nullptr);
  }
  if (keeps_state) state->advance(spans, piece.lengths);
  return in_token_order(normed, routing);
}

at::Tensor LanguageModel::logits(const at::Tensor& hidden) const {
  return operators::linear(hidden, embedding_);
}

std::pair<at::Tensor, at::Tensor> LanguageModel::loss(const at::Tensor& hidden, const at::Tensor& targets,
                                                      double scale) const {
  const auto [total, each] = operators::cross_entropy(hidden, embedding_, targets, scale);
  return {total, each};
}

}  // namespace oryx::model
