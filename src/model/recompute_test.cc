#include "model/recompute.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "model/testing.h"

namespace oryx::model {
namespace {

// The gradients of a loss over random tokens, in the order of the weights.
std::vector<at::Tensor> gradients(LanguageModel& model, const at::Tensor& tokens,
                                  const std::vector<schedule::ModeSpans>& spans) {
  const at::Tensor hidden = model.hidden(tokens, spans);
  model.loss(hidden, tokens.reshape({-1}), 0.1).first.backward();
  std::vector<at::Tensor> result;
  for (auto& [name, weight] : model.weights().entries()) {
    result.push_back(weight.grad().defined() ? weight.grad().clone() : at::Tensor());
    weight.mutable_grad().reset();
  }
  return result;
}

RC_GTEST_PROP(Recompute, GivesTheSameGradients, ()) {
  const ModelConfig config = testing::random_config();
  LanguageModel model = testing::random_model(config, at::kFloat, 3);
  for (auto& [name, weight] : model.weights().entries()) weight.set_requires_grad(true);
  // Shorter ones run token by token where no gradient is wanted, with other rounding.
  const int64_t time = *rc::gen::inRange<int64_t>(6, 60);
  const at::Tensor tokens = testing::random_tokens(config, 2, time, 5);
  const std::vector<schedule::ModeSpans> spans = {testing::random_spans(config, time)};
  const std::vector<at::Tensor> kept = gradients(model, tokens, spans);
  model.set_recompute_layers(true);
  const std::vector<at::Tensor> made_again = gradients(model, tokens, spans);
  for (size_t i = 0; i < kept.size(); ++i) {
    RC_ASSERT(kept[i].defined() == made_again[i].defined());
    if (!kept[i].defined()) continue;
    RC_LOG() << model.weights().entries()[i].first << " differs by "
             << (kept[i] - made_again[i]).abs().max().item<double>() << " of "
             << kept[i].abs().max().item<double>();
    RC_ASSERT(at::equal(kept[i], made_again[i]));
  }
}

}  // namespace
}  // namespace oryx::model
