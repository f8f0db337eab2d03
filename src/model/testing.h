// Random small models and schedules for property tests.
#pragma once

#include <ATen/ATen.h>
#include <rapidcheck.h>

#include <algorithm>
#include <string>
#include <vector>

#include "model/language_model.h"

namespace oryx::model::testing {

// A config of two or three narrow layers: switchable with either linear mixer and random cells, grouped
// heads, a baseline, or a static hybrid.
inline ModelConfig random_config() {
  const int kind = *rc::gen::weightedElement<int>({{4, 0}, {4, 1}, {1, 2}, {1, 3}, {1, 4}, {1, 5}, {1, 6}});
  using Names = std::vector<std::string>;
  const Names tm{"attention", "ssd"}, tg{"attention", "gated_delta"};
  const std::vector<Names> mixers = {tm, tg, Names{"attention"}, Names{"ssd"}, Names{"gated_delta"}, tm, tg};
  ModelConfig config = ModelConfig::with_mixers(mixers[kind]);
  config.layers = *rc::gen::inRange(2, 4);
  config.width = 16;
  config.heads = 4;
  config.head_dim = *rc::gen::element(2, 4, 8);
  config.kv_heads = config.heads;
  config.mlp_width = 24;
  config.vocabulary = 40;
  if (kind < 2) {
    config.kv_heads = *rc::gen::element(1, 2, 4);
    config.gate = *rc::gen::weightedElement<bool>({{3, true}, {1, false}});
    config.short_conv = *rc::gen::weightedElement<bool>({{3, true}, {1, false}});
    config.conv_width = *rc::gen::weightedElement<int64_t>({{4, 4}, {1, 2}, {1, 1}});
    config.norm = *rc::gen::element<std::string>("full", "per_head", "none");
    config.norm_order = *rc::gen::element<std::string>("after_gate", "before_gate");
    config.rope = *rc::gen::element<std::string>("all", "attention", "none");
    config.shared_query = *rc::gen::weightedElement<bool>({{3, false}, {1, true}});
    config.attention.l2_norm = *rc::gen::element<std::string>("none", "key", "query_key");
  }
  config.value_heads = config.kv_heads;
  config.value_dim = config.head_dim;
  if (kind == 3) {  // one group of keys and queries for all states, as Mamba-2 has it
    config.heads = config.kv_heads = 1;
    config.value_heads = 4;
  }
  if (kind == 4) config.value_dim = 2 * config.head_dim;
  if (kind == 5) {
    config.hybrid = "inter_layer";
    config.layer_pattern = {"attention", "ssd"};
  }
  if (kind == 6) config.hybrid = "intra_layer";
  config.validate("random config");
  return config;
}

// Narrow, switchable between attention and `linear`.
inline ModelConfig small_config(const std::string& linear, int64_t layers) {
  ModelConfig config = ModelConfig::with_mixers({"attention", linear});
  config.layers = layers;
  config.width = 16;
  config.heads = config.kv_heads = config.value_heads = 2;
  config.head_dim = config.value_dim = 8;
  config.mlp_width = 24;
  config.vocabulary = 40;
  return config;
}

// Weights large enough that every part of the model matters to the output.
inline LanguageModel random_model(const ModelConfig& config, at::ScalarType dtype, uint64_t seed) {
  Weights weights = initial_weights(config, seed, dtype);
  for (auto& [name, tensor] : weights.entries()) {
    if (tensor.dim() == 2 && tensor.size(1) != config.conv_width) tensor.mul_(10);
  }
  return LanguageModel(config, std::move(weights), dtype);
}

// Modes of [0, length), switching anywhere; only modes that the model has.
inline schedule::ModeSpans random_spans(const ModelConfig& config, int64_t length) {
  schedule::ModeSpans spans;
  const bool attention = config.has_mode(schedule::Mode::attention),
             linear = config.has_mode(schedule::Mode::linear);
  for (int64_t begin = 0; begin < length;) {
    const int64_t end = std::min(length, begin + *rc::gen::inRange<int64_t>(1, 40));
    const bool choose_linear = linear && (!attention || *rc::gen::arbitrary<bool>());
    spans.push_back({begin, end, choose_linear ? schedule::Mode::linear : schedule::Mode::attention});
    begin = end;
  }
  return schedule::merge(spans);
}

inline at::Tensor random_tokens(const ModelConfig& config, int64_t batch, int64_t time, uint64_t seed) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  return at::randint(config.vocabulary, {batch, time}, generator, at::TensorOptions(at::kLong));
}

inline double relative_error(const at::Tensor& got, const at::Tensor& expected) {
  const at::Tensor reference = expected.to(at::kDouble);
  return ((got.to(at::kDouble) - reference).abs().max() / reference.abs().max().clamp_min(1e-30))
      .item<double>();
}

}  // namespace oryx::model::testing
