#include "model/weights.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>

#include <fmt/ranges.h>

#include "base/error.h"
#include "base/random.h"
#include "formats/file.h"
#include "formats/json.h"
#include "formats/safetensors.h"
#include "model/block.h"

namespace oryx::model {

namespace {

// FNV-1a: the initial value of a parameter depends on its name, not on its place in the model.
uint64_t hash(std::string_view text) {
  uint64_t value = 0xcbf29ce484222325u;
  for (const char c : text) value = (value ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return value;
}

at::Tensor initial_value(const ParameterSpec& spec, const ModelConfig& config, at::Generator generator) {
  // Drawn in float64 so that every storage type starts from the same values.
  at::Tensor value = at::empty(spec.shape, at::kDouble);
  switch (spec.initialisation) {
    case Initialisation::normal:
      return value.normal_(0, 0.02, generator);
    case Initialisation::scaled_normal:
      return value.normal_(0, 0.02 / std::sqrt(2.0 * static_cast<double>(config.layers)), generator);
    case Initialisation::convolution: {
      const double bound = 1 / std::sqrt(static_cast<double>(config.conv_width));
      return value.uniform_(-bound, bound, generator);
    }
    case Initialisation::ones:
      return value.fill_(1);
    case Initialisation::zeros:
      return value.fill_(0);
    case Initialisation::log_uniform_decay:
      return value.uniform_(1, 16, generator).log_();
    case Initialisation::log_small_decay:
      return value.uniform_(1e-3, 16, generator).log_();
    case Initialisation::step_bias: {
      const at::Tensor step = value.uniform_(std::log(1e-3), std::log(1e-1), generator).exp().clamp_min(1e-4);
      return step + (-(-step).expm1()).log();  // softplus⁻¹
    }
  }
  fail("{}: unknown initialisation", spec.name);
}

at::ScalarType vector_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace

int64_t ParameterSpec::size() const {
  int64_t product = 1;
  for (const int64_t extent : shape) product *= extent;
  return product;
}

std::vector<ParameterSpec> parameter_specs(const ModelConfig& config) {
  std::vector<ParameterSpec> specs;
  specs.push_back({"embedding.weight", {config.vocabulary, config.width}, Initialisation::normal, true, ""});
  for (int64_t n = 0; n < config.layers; ++n) add_layer_parameters(config, n, specs);
  specs.push_back({"final_norm.weight", {config.width}, Initialisation::ones, false, ""});
  return specs;
}

const at::Tensor& Weights::at(std::string_view name) const {
  for (const auto& [known, tensor] : entries_) {
    if (known == name) return tensor;
  }
  fail("the model has no tensor {}", name);
}

at::Tensor Weights::find(std::string_view name) const {
  for (const auto& [known, tensor] : entries_) {
    if (known == name) return tensor;
  }
  return {};
}

Weights initial_weights(const ModelConfig& config, uint64_t seed, at::ScalarType dtype) {
  Weights weights;
  for (const ParameterSpec& spec : parameter_specs(config)) {
    const uint64_t own_seed = random_u64(seed, hash(spec.name), 0);
    weights.add(spec.name, initial_value(spec, config, at::detail::createCPUGenerator(own_seed))
                               .to(spec.is_matrix ? dtype : vector_type(dtype)));
  }
  return weights;
}

void round_matrices(Weights& weights, const std::vector<ParameterSpec>& specs, at::ScalarType dtype) {
  for (size_t i = 0; i < specs.size(); ++i) {
    at::Tensor& tensor = weights.entries()[i].second;
    if (!specs[i].is_matrix || tensor.scalar_type() == dtype) continue;
    const at::ScalarType original = tensor.scalar_type();
    tensor = tensor.detach().to(dtype);
    tensor.set_grad_dtype(original);
  }
}

ModelConfig load_config(const std::filesystem::path& directory) {
  expect(std::filesystem::is_directory(directory), "{} is not a model directory", directory.string());
  const std::filesystem::path file = directory / "config.json";
  expect(std::filesystem::exists(file), "{} has no config.json", directory.string());
  return ModelConfig::read(formats::read_json(file.string()), "");
}

Weights load_weights(const std::filesystem::path& directory, const ModelConfig& config,
                     at::ScalarType dtype) {
  const formats::TensorFiles files = formats::TensorFiles::open(directory.string());
  const std::vector<ParameterSpec> specs = parameter_specs(config);
  std::set<std::string_view> expected;
  for (const ParameterSpec& spec : specs) expected.insert(spec.name);
  for (const std::string& name : files.names()) {
    expect(expected.contains(name), "{}: unexpected tensor {}: the config asks for none of this name",
           directory.string(), name);
  }
  Weights weights;
  for (const ParameterSpec& spec : specs) {
    expect(files.contains(spec.name), "{}: tensor {} is missing", directory.string(), spec.name);
    const at::Tensor stored = files.tensor(spec.name);
    expect(stored.sizes() == at::IntArrayRef(spec.shape), "{}: expected {} [{}], got [{}]",
           directory.string(), spec.name, fmt::join(spec.shape, ", "), fmt::join(stored.sizes(), ", "));
    expect(at::isFloatingType(stored.scalar_type()), "{}: expected {} of a floating type, got {}",
           directory.string(), spec.name, c10::toString(stored.scalar_type()));
    // A copy, always: the mapping of the file is read-only and unaligned.
    weights.add(spec.name, stored.to(spec.is_matrix ? dtype : vector_type(dtype), /*non_blocking=*/false,
                                     /*copy=*/true));
  }
  return weights;
}

void save_model(const std::filesystem::path& directory, const ModelConfig& config, const Weights& weights,
                const std::filesystem::path& tokenizer_file) {
  formats::NamedTensors tensors;
  for (const auto& [name, tensor] : weights.entries()) tensors.emplace_back(name, tensor.detach());
  if (!tokenizer_file.empty()) {
    std::filesystem::copy_file(tokenizer_file, directory / "tokenizer.json",
                               std::filesystem::copy_options::overwrite_existing);
  }
  formats::write_file_atomic((directory / "config.json").string(),
                             formats::to_json(field_table(config), 2) + "\n");
  formats::write_tensor_files(directory.string(), tensors);
}

}  // namespace oryx::model
