// The parameters of a model: their names and shapes from a config, their initial values, their files.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "model/config.h"

namespace oryx::model {

enum class Initialisation {
  normal,         // N(0, 0.02)
  scaled_normal,  // N(0, 0.02 / √(2·layers)): projections that write to the residual stream
  convolution,    // U(−1/√taps, 1/√taps): ±½ at four taps
  ones,
  zeros,
  log_uniform_decay,  // log of U(1, 16): A_log of ssd
  log_small_decay,    // log of U(1e-3, 16): A_log of gated_delta
  step_bias,          // softplus⁻¹ of a step log-uniform in [1e-3, 1e-1], at least 1e-4
};

struct ParameterSpec {
  std::string name;
  std::vector<int64_t> shape;
  Initialisation initialisation;
  // A matrix of the products; computed in the computing type. The others are float32 (float64) always.
  bool is_matrix = false;
  // Mixer that alone reads it ("" when shared by all modes).
  std::string mixer;

  int64_t size() const;
  bool decays() const { return shape.size() > 1; }  // weight decay spares one-dimensional tensors
};

// Every parameter of the model in the order of its files.
std::vector<ParameterSpec> parameter_specs(const ModelConfig& config);

// Named tensors in a fixed order.
class Weights {
 public:
  void add(std::string name, at::Tensor tensor) { entries_.emplace_back(std::move(name), std::move(tensor)); }
  // Throws Error when there is none of this name.
  const at::Tensor& at(std::string_view name) const;
  // An undefined tensor when there is none.
  at::Tensor find(std::string_view name) const;
  const std::vector<std::pair<std::string, at::Tensor>>& entries() const { return entries_; }
  std::vector<std::pair<std::string, at::Tensor>>& entries() { return entries_; }

 private:
  std::vector<std::pair<std::string, at::Tensor>> entries_;
};

// Fresh parameters; each depends on the seed and its own name only.
Weights initial_weights(const ModelConfig& config, uint64_t seed, at::ScalarType dtype);

// Replaces the matrices among `weights` (one for every spec) by their rounding to `dtype`: leaves that
// collect their gradients in the type they had, so that a model computes in `dtype` what it would with the
// originals, bit for bit.
void round_matrices(Weights& weights, const std::vector<ParameterSpec>& specs, at::ScalarType dtype);

// A model directory: config.json, model.safetensors or its shards, tokenizer.json.
ModelConfig load_config(const std::filesystem::path& directory);
// Every parameter of `config`, converted to `dtype` (matrices) and to float32 or float64 (the others).
// Throws Error naming tensors that are missing, unexpected, or of another shape.
Weights load_weights(const std::filesystem::path& directory, const ModelConfig& config, at::ScalarType dtype);
// Writes config.json and model.safetensors into an existing directory, and tokenizer.json copied from
// `tokenizer_file` unless that is empty.
void save_model(const std::filesystem::path& directory, const ModelConfig& config, const Weights& weights,
                const std::filesystem::path& tokenizer_file);

}  // namespace oryx::model
