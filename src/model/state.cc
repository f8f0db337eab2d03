#include "model/state.h"

#include <ATen/ATen.h>

#include <algorithm>

#include <fmt/ranges.h>

#include "base/error.h"
#include "base/shapes.h"
#include "formats/safetensors.h"
#include "model/mixers/mixer.h"
#include "operators/activations.h"

namespace oryx::model {

namespace {

bool has_attention(const std::vector<std::string>& mixers) {
  return std::find(mixers.begin(), mixers.end(), "attention") != mixers.end();
}

// The linear mixer of a layer, "" when it has none.
std::string linear_mixer(const std::vector<std::string>& mixers) {
  for (const std::string& name : mixers) {
    if (mixer_type(name).mode == schedule::Mode::linear) return name;
  }
  return "";
}

// What a layer's state is called in a file, with the tensors that hold it.
struct Named {
  std::string name;
  at::Tensor* tensor;
  bool is_cache;
};

std::vector<Named> named_tensors(const ModelConfig& config, int64_t layer, LayerState& state) {
  const std::string prefix = fmt::format("layers.{}.", layer);
  std::vector<Named> named = {
      {prefix + "key_cache", &state.key_cache, true},
      {prefix + "value_cache", &state.value_cache, true},
      {prefix + linear_mixer(config.layer_mixers(layer)) + ".state", &state.recurrent, false},
      {prefix + "key_conv_tail", &state.key_tail, false},
      {prefix + "value_conv_tail", &state.value_tail, false},
      {prefix + "query_conv_tail", &state.query_tail, false}};
  std::erase_if(named, [](const Named& entry) { return !entry.tensor->defined(); });
  return named;
}

at::Tensor filled(const at::Tensor& tensor, bool is_cache, int64_t position) {
  return is_cache ? tensor.narrow(1, 0, position) : tensor;
}

}  // namespace

JointState JointState::empty(const ModelConfig& config, int64_t batch, at::ScalarType dtype,
                             at::Device device) {
  JointState state;
  state.batch_ = batch;
  state.modes_.resize(batch);
  state.layers_.resize(config.layers);
  const at::TensorOptions options = at::TensorOptions(dtype).device(device);
  for (int64_t n = 0; n < config.layers; ++n) {
    LayerState& layer = state.layers_[n];
    const std::vector<std::string> mixers = config.layer_mixers(n);
    if (has_attention(mixers)) {
      layer.key_cache = at::empty({batch, 0, config.kv_heads, config.head_dim}, options);
      layer.value_cache = at::empty({batch, 0, config.value_heads, config.value_dim}, options);
    }
    if (!linear_mixer(mixers).empty()) {
      layer.recurrent = at::zeros({batch, config.value_heads, config.head_dim, config.value_dim},
                                  options.dtype(operators::accumulate_type(dtype)));
    }
    if (config.short_conv) {
      const int64_t taps = config.conv_width - 1;
      layer.key_tail = at::zeros({batch, taps, config.kv_heads * config.head_dim}, options);
      layer.value_tail = at::zeros({batch, taps, config.value_heads * config.value_dim}, options);
      if (config.query_conv)
        layer.query_tail = at::zeros({batch, taps, config.heads * config.head_dim}, options);
    }
  }
  return state;
}

void JointState::advance(const std::vector<schedule::ModeSpans>& spans, int64_t tokens) {
  for (int64_t b = 0; b < batch_; ++b) {
    const schedule::ModeSpans piece =
        schedule::cut(spans[spans.size() == 1 ? 0 : b], position_, position_ + tokens);
    schedule::ModeSpans& modes = modes_[b];
    modes.insert(modes.end(), piece.begin(), piece.end());
    modes = schedule::merge(modes);
  }
  position_ += tokens;
}

JointState JointState::clone() const {
  JointState copy = *this;
  for (LayerState& layer : copy.layers_) {
    for (at::Tensor* tensor : {&layer.recurrent, &layer.key_tail, &layer.value_tail, &layer.query_tail}) {
      if (tensor->defined()) *tensor = tensor->clone();
    }
    for (at::Tensor* cache : {&layer.key_cache, &layer.value_cache}) {
      if (cache->defined()) *cache = cache->narrow(1, 0, position_).clone();
    }
  }
  return copy;
}

JointState JointState::select(const at::Tensor& rows) const {
  JointState selected;
  selected.batch_ = rows.numel();
  selected.position_ = position_;
  selected.layers_.resize(layers_.size());
  const at::Tensor indices = rows.to(at::kCPU, at::kLong).contiguous();
  for (int64_t i = 0; i < indices.numel(); ++i) {
    const int64_t row = indices.data_ptr<int64_t>()[i];
    expect(row >= 0 && row < batch_, "expected a sequence in 0…{}, got {}", batch_ - 1, row);
    selected.modes_.push_back(modes_[row]);
  }
  for (size_t n = 0; n < layers_.size(); ++n) {
    const LayerState& from = layers_[n];
    LayerState& to = selected.layers_[n];
    const auto pick = [&](const at::Tensor& tensor, bool is_cache) {
      if (!tensor.defined()) return at::Tensor();
      return filled(tensor, is_cache, position_).index_select(0, indices.to(tensor.device()));
    };
    to = {pick(from.key_cache, true), pick(from.value_cache, true), pick(from.recurrent, false),
          pick(from.key_tail, false), pick(from.value_tail, false), pick(from.query_tail, false)};
  }
  return selected;
}

int64_t JointState::bytes() const {
  int64_t total = 0;
  for (const LayerState& layer : layers_) {
    for (const at::Tensor* tensor :
         {&layer.recurrent, &layer.key_tail, &layer.value_tail, &layer.query_tail}) {
      if (tensor->defined()) total += static_cast<int64_t>(tensor->nbytes());
    }
    for (const at::Tensor* cache : {&layer.key_cache, &layer.value_cache}) {
      if (cache->defined()) total += static_cast<int64_t>(cache->narrow(1, 0, position_).nbytes());
    }
  }
  return total;
}

void JointState::save(const std::filesystem::path& file, const ModelConfig& config) const {
  formats::NamedTensors tensors;
  JointState copy = *this;  // shares the tensors
  for (int64_t n = 0; n < config.layers; ++n) {
    for (const Named& entry : named_tensors(config, n, copy.layers_[n])) {
      tensors.emplace_back(entry.name, filled(*entry.tensor, entry.is_cache, position_));
    }
  }
  at::Tensor modes = at::empty({batch_, position_}, at::kByte);
  for (int64_t b = 0; b < batch_; ++b) {
    for (const schedule::ModeSpan& span : modes_[b]) {
      modes[b].slice(0, span.begin, span.end).fill_(static_cast<int64_t>(span.mode));
    }
  }
  tensors.emplace_back("position", at::tensor({position_}, at::kLong));
  tensors.emplace_back("modes", modes);
  formats::write_safetensors(file.string(), tensors);
}

JointState JointState::load(const std::filesystem::path& file, const ModelConfig& config,
                            at::ScalarType dtype, at::Device device) {
  const formats::SafetensorsFile stored(file.string());
  const std::string where = file.string();
  const at::Tensor position = stored.tensor("position"), modes = stored.tensor("modes");
  expect(position.scalar_type() == at::kLong && position.numel() == 1, "{}: expected position [1] int64",
         where);
  expect(modes.scalar_type() == at::kByte && modes.dim() == 2, "{}: expected modes [batch, position] uint8",
         where);
  const int64_t tokens = position.item<int64_t>();
  expect(tokens >= 0 && modes.size(1) == tokens, "{}: position is {}, but modes has {} tokens", where, tokens,
         modes.size(1));
  JointState state = empty(config, modes.size(0), dtype, device);
  state.position_ = tokens;
  for (int64_t b = 0; b < state.batch_; ++b) {
    const at::Tensor row = modes[b].contiguous();
    const uint8_t* values = row.data_ptr<uint8_t>();
    for (int64_t t = 0; t < tokens; ++t) {
      expect(values[t] <= 1, "{}: expected modes 0 or 1, got {}", where, values[t]);
      state.modes_[b].push_back({t, t + 1, static_cast<schedule::Mode>(values[t])});
    }
    state.modes_[b] = schedule::merge(state.modes_[b]);
  }
  for (int64_t n = 0; n < config.layers; ++n) {
    for (const Named& entry : named_tensors(config, n, state.layers_[n])) {
      std::vector<int64_t> shape = entry.tensor->sizes().vec();
      if (entry.is_cache) shape[1] = tokens;
      const at::Tensor read = stored.tensor(entry.name);
      expect(read.sizes().vec() == shape, "{}: expected {} [{}], got [{}]", where, entry.name,
             fmt::join(shape, ", "), fmt::join(read.sizes(), ", "));
      *entry.tensor = read.to(entry.tensor->options(), /*non_blocking=*/false, /*copy=*/true);
    }
  }
  return state;
}

at::Tensor append_to_cache(at::Tensor& cache, const at::Tensor& tokens, int64_t position) {
  const int64_t end = position + tokens.size(1);
  if (cache.size(1) < end) {
    // Half as much again keeps the copying linear in the length; the first piece gets what it asks for.
    const int64_t capacity = position == 0 ? end : std::max(end, position + position / 2 + 64);
    at::Tensor grown = at::empty({cache.size(0), capacity, cache.size(2), cache.size(3)}, cache.options());
    grown.narrow(1, 0, position).copy_(cache.narrow(1, 0, position));
    cache = grown;
  }
  cache.narrow(1, position, tokens.size(1)).copy_(tokens);
  return cache.narrow(1, 0, end);
}

}  // namespace oryx::model
