#include "model/weights.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "model/testing.h"

namespace oryx::model {
namespace {

struct Results {
  at::Tensor loss;
  std::vector<at::Tensor> gradients;
};

// Loss and gradients in bfloat16 over two passes.
Results train_on(Weights weights, const ModelConfig& config, const std::vector<schedule::ModeSpans>& spans,
                 const at::Tensor& tokens, bool recompute) {
  for (auto& [name, tensor] : weights.entries()) tensor.set_requires_grad(true);
  LanguageModel model(config, std::move(weights), at::kBFloat16);
  model.set_recompute_layers(recompute);
  Results results;
  for (int pass = 0; pass < 2; ++pass) {
    const at::Tensor loss = model.loss(model.hidden(tokens, spans), tokens.reshape({-1}), 0.1).first;
    loss.backward();
    results.loss = loss.detach();
  }
  for (const auto& [name, tensor] : model.weights().entries()) results.gradients.push_back(tensor.grad());
  return results;
}

// Every operator that reads a matrix, in every kind of model.
RC_GTEST_PROP(RoundMatrices, ChangesNeitherLossNorGradients, ()) {
  const ModelConfig config = testing::random_config();
  const std::vector<ParameterSpec> specs = parameter_specs(config);
  const bool recompute = *rc::gen::arbitrary<bool>();
  const int64_t time = *rc::gen::inRange<int64_t>(6, 60);
  const at::Tensor tokens = testing::random_tokens(config, 2, time, 5);
  const std::vector<schedule::ModeSpans> spans = {testing::random_spans(config, time)};
  const Results whole = train_on(initial_weights(config, 3, at::kFloat), config, spans, tokens, recompute);
  Weights rounded = initial_weights(config, 3, at::kFloat);
  round_matrices(rounded, specs, at::kBFloat16);
  for (size_t i = 0; i < specs.size(); ++i) {
    RC_ASSERT(rounded.entries()[i].second.scalar_type() == (specs[i].is_matrix ? at::kBFloat16 : at::kFloat));
  }
  const Results results = train_on(std::move(rounded), config, spans, tokens, recompute);
  RC_ASSERT(at::equal(results.loss, whole.loss));
  for (size_t i = 0; i < specs.size(); ++i) {
    RC_LOG() << specs[i].name;
    RC_ASSERT(results.gradients[i].defined() == whole.gradients[i].defined());
    if (!whole.gradients[i].defined()) continue;
    RC_ASSERT(results.gradients[i].scalar_type() == at::kFloat);
    RC_ASSERT(at::equal(results.gradients[i], whole.gradients[i]));
  }
}

}  // namespace
}  // namespace oryx::model
