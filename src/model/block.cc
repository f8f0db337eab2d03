#include "model/block.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "operators/gated_linear/gated_linear.h"
#include "operators/gated_norm/gated_norm.h"
#include "operators/linear/linear.h"
#include "operators/rotary/rotary.h"
#include "operators/short_conv/short_conv.h"

namespace oryx::model {

namespace {

std::string layer_prefix(int64_t layer) { return fmt::format("layers.{}.", layer); }

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// One norm for the block's output, or one per mixer where each output is normalised on its own.
bool has_norm_per_mixer(const ModelConfig& config) { return config.hybrid == "intra_layer"; }

}  // namespace

void add_layer_parameters(const ModelConfig& config, int64_t layer, std::vector<ParameterSpec>& specs) {
  const std::string prefix = layer_prefix(layer), mixer_prefix = prefix + "mixer.";
  const int64_t width = config.width, inner = config.inner_width();
  const int64_t query_channels = config.heads * config.head_dim,
                key_channels = config.kv_heads * config.head_dim;
  const int64_t value_channels = config.value_heads * config.value_dim;
  const auto matrix = [&](const std::string& name, int64_t out, int64_t in, bool writes_residual = false) {
    specs.push_back({name,
                     {out, in},
                     writes_residual ? Initialisation::scaled_normal : Initialisation::normal,
                     true,
                     ""});
  };
  const auto vector = [&](const std::string& name, int64_t size) {
    specs.push_back({name, {size}, Initialisation::ones, false, ""});
  };
  const auto convolution = [&](const std::string& name, int64_t channels) {
    specs.push_back({mixer_prefix + name + ".weight",
                     {channels, config.conv_width},
                     Initialisation::convolution,
                     false,
                     ""});
    if (config.conv_bias) {
      specs.push_back({mixer_prefix + name + ".bias", {channels}, Initialisation::convolution, false, ""});
    }
  };

  vector(prefix + "mixer_norm.weight", width);
  matrix(mixer_prefix + "key.weight", key_channels, width);
  matrix(mixer_prefix + "value.weight", value_channels, width);
  if (config.gate) matrix(mixer_prefix + "gate.weight", inner, width);
  if (config.short_conv) {
    convolution("key_conv", key_channels);
    convolution("value_conv", value_channels);
    if (config.query_conv) convolution("query_conv", query_channels);
  }
  const std::vector<std::string> mixers = config.layer_mixers(layer);
  const int64_t norm_size = config.norm == "full" ? inner : config.value_dim;
  if (config.norm != "none" && !has_norm_per_mixer(config)) vector(mixer_prefix + "norm.weight", norm_size);
  if (config.shared_query) matrix(mixer_prefix + "query.weight", query_channels, width);
  for (const std::string& name : mixers) {
    const std::string own = mixer_prefix + name + ".";
    if (!config.shared_query) {
      specs.push_back({own + "query.weight", {query_channels, width}, Initialisation::normal, true, name});
    }
    mixer_type(name).add_parameters(config, own, specs);
    if (config.norm != "none" && has_norm_per_mixer(config)) {
      specs.push_back({own + "norm.weight", {norm_size}, Initialisation::ones, false, name});
    }
  }
  matrix(mixer_prefix + "output.weight", width, inner, /*writes_residual=*/true);
  vector(prefix + "mlp_norm.weight", width);
  matrix(prefix + "mlp.gate.weight", config.mlp_width, width);
  matrix(prefix + "mlp.up.weight", config.mlp_width, width);
  matrix(prefix + "mlp.down.weight", width, config.mlp_width, /*writes_residual=*/true);
}

Block::Block(const ModelConfig& config, int64_t layer, const Weights& weights) : config_(config) {
  const std::string prefix = layer_prefix(layer) + "mixer.";
  const auto find = [&](const std::string& name) { return weights.find(prefix + name); };
  key_ = weights.at(prefix + "key.weight");
  value_ = weights.at(prefix + "value.weight");
  gate_ = find("gate.weight");
  output_ = weights.at(prefix + "output.weight");
  norm_ = find("norm.weight");
  shared_query_ = find("query.weight");
  key_conv_ = {find("key_conv.weight"), find("key_conv.bias")};
  value_conv_ = {find("value_conv.weight"), find("value_conv.bias")};
  query_conv_ = {find("query_conv.weight"), find("query_conv.bias")};
  for (const std::string& name : config.layer_mixers(layer)) {
    const MixerType& type = mixer_type(name);
    const std::string own = prefix + name + ".";
    parts_.push_back({type.make(config, own, weights), type.mode,
                      config.shared_query ? shared_query_ : weights.at(own + "query.weight"),
                      config.rope == "all" || (config.rope == "attention" && name == "attention"),
                      find(name + ".norm.weight")});
  }
}

const Selection& Block::selection(const Part& part, const Routing& routing) const {
  if (parts_.size() == 1 || config_.hybrid != "none") return routing.everything;
  return part.mode == schedule::Mode::attention ? routing.attention : routing.linear;
}

Block::Handles Block::convolve(const at::Tensor& x, const Convolution& convolution, const Routing& routing,
                               at::Tensor* tail) const {
  const auto tokens = [&] { return in_token_order(x, routing).view({routing.batch, routing.time, -1}); };
  if (!convolution.weight.defined()) {
    const at::Tensor y = config_.conv_activation == "silu" ? at::silu(tokens()) : tokens();
    return {y, y};
  }
  std::optional<at::Tensor> before;
  if (tail != nullptr) before = *tail;
  auto [y, again, after] = operators::short_conv_for_two(routing.rows ? x : tokens(), convolution.weight,
                                                         optional(convolution.bias), before,
                                                         config_.conv_activation, routing.rows);
  if (tail == nullptr || !routing.keeps_state) return {y, again};
  if (routing.tail_rows) {
    const at::Tensor inputs = routing.has_tails ? x : at::cat({*before, tokens()}, 1).flatten(0, 1);
    after = inputs.index_select(0, *routing.tail_rows).view(before->sizes());
  }
  *tail = after;
  return {y, again};
}

at::Tensor Block::gated_norm(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& norm) const {
  if (!gate.defined() && !norm.defined()) return x;
  return operators::gated_norm(x, optional(gate), optional(norm), config_.norm_eps, config_.norm_order);
}

at::Tensor Block::forward(const at::Tensor& x, const Routing& routing, LayerState* state) const {
  const int64_t rows = routing.batch * routing.time;
  std::vector<const Part*> active;
  for (const Part& part : parts_) {
    if (part.mixer->is_needed(selection(part, routing), routing, state)) active.push_back(&part);
  }

  // Every projection of x in one call: the backward pass then sums their gradients in one buffer, and a query
  // is projected for its own tokens only.
  std::vector<at::Tensor> weights = {key_, value_};
  if (gate_.defined()) weights.push_back(gate_);
  std::vector<operators::RowRange> ranges(weights.size(), {0, rows});
  for (const Part* part : active) {
    const Selection& own = selection(*part, routing);
    weights.push_back(part->query);
    ranges.push_back({own.first_row, own.count});
    for (const at::Tensor& weight : part->mixer->projections()) {
      weights.push_back(weight);
      ranges.push_back({0, rows});
    }
  }
  const std::vector<at::Tensor> projected = operators::projections(x, weights, ranges);
  size_t next = 0;

  const Handles keys = convolve(projected[next++], key_conv_, routing, state ? &state->key_tail : nullptr);
  const Handles values =
      convolve(projected[next++], value_conv_, routing, state ? &state->value_tail : nullptr);
  const at::Tensor gate = gate_.defined() ? projected[next++] : at::Tensor();
  std::array<SharedInput, 2> shared;  // the two mixers' own handles
  for (size_t i = 0; i < shared.size(); ++i) {
    shared[i].routing = &routing;
    shared[i].cosine = routing.everything.cosine;
    shared[i].sine = routing.everything.sine;
    shared[i].key = keys[i].view({routing.batch, routing.time, config_.kv_heads, config_.head_dim});
    shared[i].value = values[i].view({routing.batch, routing.time, config_.value_heads, config_.value_dim});
  }
  if (std::any_of(active.begin(), active.end(), [](const Part* part) { return part->reads_rotated_key; })) {
    std::tie(shared[0].rotated_key, shared[1].rotated_key) =
        operators::rotary_for_two(shared[0].key, shared[0].cosine, shared[0].sine);
  }

  std::vector<at::Tensor> outputs;
  for (const Part* part : active) {
    const Selection& own = selection(*part, routing);
    at::Tensor query = projected[next++];
    if (query_conv_.weight.defined()) {
      query = convolve(query, query_conv_, routing, state ? &state->query_tail : nullptr)[0].view(
          {rows, config_.heads * config_.head_dim});
    }
    const size_t extra = part->mixer->projections().size();
    std::vector<at::Tensor> own_projected;
    for (size_t i = 0; i < extra; ++i) own_projected.push_back(projected[next++]);
    const SharedInput& own_shared = shared[part->mode == schedule::Mode::attention ? 0 : 1];
    at::Tensor output = part->mixer->forward(query.view({own.count, config_.heads, config_.head_dim}),
                                             own_shared, own_projected, own, state);
    if (own.count == 0) continue;
    output = output.reshape({own.count, config_.inner_width()});
    if (config_.hybrid == "intra_layer") output = gated_norm(output, gate, part->output_norm);
    outputs.insert(own.first_row == 0 ? outputs.begin() : outputs.end(), output);
  }

  if (config_.hybrid == "intra_layer") {
    at::Tensor mixed = outputs[0];
    for (size_t i = 1; i < outputs.size(); ++i) mixed = mixed + outputs[i];
    return operators::linear(mixed / static_cast<double>(outputs.size()), output_);
  }
  const at::Tensor mixed = outputs.size() == 1 ? outputs[0] : at::cat(outputs);
  if (!gate.defined() && !norm_.defined()) return operators::linear(mixed, output_);
  return operators::gated_linear(mixed, optional(gate), optional(norm_), config_.norm_eps, config_.norm_order,
                                 output_);
}

Layer::Layer(const ModelConfig& config, int64_t layer, const Weights& weights)
    : norm_eps_(config.norm_eps), block_(config, layer, weights) {
  const std::string prefix = layer_prefix(layer);
  mixer_norm_ = weights.at(prefix + "mixer_norm.weight");
  mlp_norm_ = weights.at(prefix + "mlp_norm.weight");
  mlp_gate_ = weights.at(prefix + "mlp.gate.weight");
  mlp_up_ = weights.at(prefix + "mlp.up.weight");
  mlp_down_ = weights.at(prefix + "mlp.down.weight");
}

std::pair<at::Tensor, at::Tensor> Layer::forward(const at::Tensor& residual, const at::Tensor& normed,
                                                 const at::Tensor& next_norm, const Routing& routing,
                                                 LayerState* state) const {
  const at::Tensor mixed = block_.forward(normed, routing, state);
  const auto [middle, middle_normed] = operators::add_norm(residual, mixed, mlp_norm_, norm_eps_);
  const operators::RowRange rows{0, middle_normed.size(0)};
  const std::vector<at::Tensor> hidden =
      operators::projections(middle_normed, {mlp_gate_, mlp_up_}, {rows, rows});
  const at::Tensor down =
      operators::gated_linear(hidden[1], hidden[0], std::nullopt, norm_eps_, "after_gate", mlp_down_);
  const auto [sum, next] = operators::add_norm(middle, down, next_norm, norm_eps_);
  return {sum, next};
}

}  // namespace oryx::model
