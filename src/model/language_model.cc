#include "model/language_model.h"

#include <ATen/ATen.h>

#include "base/error.h"
#include "base/shapes.h"
#include "model/embedding.h"
#include "model/recompute.h"
#include "operators/cross_entropy/cross_entropy.h"
#include "operators/gated_norm/gated_norm.h"
#include "operators/linear/linear.h"

namespace oryx::model {

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

JointState LanguageModel::empty_state(int64_t batch) const {
  return JointState::empty(config_, batch, dtype_, device());
}

at::Tensor LanguageModel::hidden(const at::Tensor& tokens, const std::vector<schedule::ModeSpans>& spans,
                                 JointState* state) const {
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
  const int64_t position = state ? state->position() : 0;
  const Routing routing = route(config_, spans, batch, time, position, dtype_, device());

  const at::Tensor ids = tokens.to(device(), at::kLong).reshape({batch * time});
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
  if (state != nullptr) state->advance(spans, time);
  return normed;
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
