#include "model/state.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include <fmt/ranges.h>

#include "base/device_copy.h"
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

}  // namespace

JointState JointState::empty(const ModelConfig& config, int64_t batch, at::ScalarType dtype,
                             at::Device device, NextModes next) {
  JointState state;
  state.batch_ = batch;
  if (config.is_switchable()) state.next_ = next;
  state.positions_.resize(batch);
  state.modes_.resize(batch);
  state.layers_.resize(config.layers);
  const at::TensorOptions options = at::TensorOptions(dtype).device(device);
  for (int64_t n = 0; n < config.layers; ++n) {
    LayerState& layer = state.layers_[n];
    const std::vector<std::string> mixers = config.layer_mixers(n);
    if (has_attention(mixers) && state.next_.attention) {
      layer.key_cache = at::empty({batch, 0, config.kv_heads, config.head_dim}, options);
      layer.value_cache = at::empty({batch, 0, config.value_heads, config.value_dim}, options);
    }
    if (!linear_mixer(mixers).empty() && state.next_.linear) {
      layer.recurrent = at::zeros({1, 1, 1, 1}, options.dtype(operators::accumulate_type(dtype)))
                            .expand({batch, config.value_heads, config.head_dim, config.value_dim});
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

int64_t JointState::longest() const {
  return positions_.empty() ? 0 : *std::max_element(positions_.begin(), positions_.end());
}

int64_t JointState::position() const {
  const int64_t position = longest();
  for (const int64_t other : positions_) {
    expect(other == position, "expected sequences of one length, got {} and {} tokens", position, other);
  }
  return position;
}

void JointState::make_room(int64_t time) {
  const int64_t position = longest(), end = position + time;
  for (LayerState& layer : layers_) {
    for (at::Tensor* cache : {&layer.key_cache, &layer.value_cache}) {
      if (!cache->defined() || cache->size(1) >= end) continue;
      // Half as much again keeps the copying linear in the length; the first piece gets what it asks for.
      const int64_t capacity = position == 0 ? end : std::max(end, position + position / 2 + 64);
      at::Tensor grown =
          at::empty({cache->size(0), capacity, cache->size(2), cache->size(3)}, cache->options());
      grown.narrow(1, 0, position).copy_(cache->narrow(1, 0, position));
      *cache = grown;
    }
  }
}

void JointState::advance(const std::vector<schedule::ModeSpans>& spans, const std::vector<int64_t>& lengths) {
  for (int64_t b = 0; b < batch_; ++b) {
    const int64_t end = positions_[b] + lengths[b];
    const schedule::ModeSpans piece = schedule::cut(spans[spans.size() == 1 ? 0 : b], positions_[b], end);
    schedule::ModeSpans& modes = modes_[b];
    modes.insert(modes.end(), piece.begin(), piece.end());
    modes = schedule::merge(modes);
    positions_[b] = end;
  }
}

JointState JointState::clone() const {
  JointState copy = *this;
  const int64_t position = longest();
  for (LayerState& layer : copy.layers_) {
    for (at::Tensor* tensor : {&layer.recurrent, &layer.key_tail, &layer.value_tail, &layer.query_tail}) {
      if (tensor->defined()) *tensor = tensor->clone();
    }
    for (at::Tensor* cache : {&layer.key_cache, &layer.value_cache}) {
      if (cache->defined()) *cache = cache->narrow(1, 0, position).clone();
    }
  }
  return copy;
}

JointState JointState::select(const at::Tensor& rows, int64_t room) const {
  JointState selected;
  selected.batch_ = rows.numel();
  selected.next_ = next_;
  selected.layers_.resize(layers_.size());
  const at::Tensor indices = rows.to(at::kCPU, at::kLong).contiguous();
  for (int64_t i = 0; i < indices.numel(); ++i) {
    const int64_t row = indices.data_ptr<int64_t>()[i];
    expect(row >= 0 && row < batch_, "expected a sequence in 0…{}, got {}", batch_ - 1, row);
    selected.positions_.push_back(positions_[row]);
    selected.modes_.push_back(modes_[row]);
  }
  const int64_t filled = selected.longest();
  at::Tensor on_device;
  for (size_t n = 0; n < layers_.size(); ++n) {
    const LayerState& from = layers_[n];
    LayerState& to = selected.layers_[n];
    const auto pick = [&](const at::Tensor& tensor) {
      if (!tensor.defined()) return at::Tensor();
      if (!on_device.defined()) on_device = copy_to(indices, tensor.device());
      return tensor.index_select(0, on_device);
    };
    const auto pick_cache = [&](const at::Tensor& cache) {
      if (!cache.defined()) return at::Tensor();
      if (!on_device.defined()) on_device = copy_to(indices, cache.device());
      const int64_t count = indices.numel(), width = cache.size(2) * cache.size(3);
      at::Tensor picked = at::empty({count, filled + room, cache.size(2), cache.size(3)}, cache.options());
      at::Tensor out = picked.view({count, -1}).narrow(1, 0, filled * width);
      if (filled > 0) {
        at::index_select_out(out, cache.view({batch_, -1}).narrow(1, 0, filled * width), 0, on_device);
      }
      return picked;
    };
    to = {pick_cache(from.key_cache), pick_cache(from.value_cache), from.recurrent,       {},
          pick(from.key_tail),        pick(from.value_tail),        pick(from.query_tail)};
    if (!from.recurrent.defined()) continue;
    if (!on_device.defined()) on_device = copy_to(indices, from.recurrent.device());
    to.recurrent_rows = from.recurrent_rows.defined() ? pick(from.recurrent_rows) : on_device;
  }
  return selected;
}

int64_t JointState::bytes() const {
  int64_t total = 0;
  const int64_t tokens = std::accumulate(positions_.begin(), positions_.end(), int64_t{0});
  for (const LayerState& layer : layers_) {
    for (const at::Tensor* tensor :
         {&layer.recurrent, &layer.key_tail, &layer.value_tail, &layer.query_tail}) {
      if (tensor->defined()) total += batch_ * static_cast<int64_t>(tensor->nbytes()) / tensor->size(0);
    }
    for (const at::Tensor* cache : {&layer.key_cache, &layer.value_cache}) {
      if (cache->defined()) {
        total += tokens * cache->size(2) * cache->size(3) * static_cast<int64_t>(cache->element_size());
      }
    }
  }
  return total;
}

void JointState::save(const std::filesystem::path& file, const ModelConfig& config) const {
  expect(next_.attention && next_.linear, "expected a state for both modes, to save it");
  const int64_t position = this->position();
  formats::NamedTensors tensors;
  JointState copy = *this;  // shares the tensors
  for (int64_t n = 0; n < config.layers; ++n) {
    LayerState& layer = copy.layers_[n];
    if (layer.recurrent_rows.defined())
      layer.recurrent = layer.recurrent.index_select(0, layer.recurrent_rows);
    for (const Named& entry : named_tensors(config, n, layer)) {
      tensors.emplace_back(entry.name, entry.is_cache ? entry.tensor->narrow(1, 0, position) : *entry.tensor);
    }
  }
  at::Tensor modes = at::empty({batch_, position}, at::kByte);
  for (int64_t b = 0; b < batch_; ++b) {
    for (const schedule::ModeSpan& span : modes_[b]) {
      modes[b].slice(0, span.begin, span.end).fill_(static_cast<int64_t>(span.mode));
    }
  }
  tensors.emplace_back("position", at::tensor({position}, at::kLong));
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
  std::fill(state.positions_.begin(), state.positions_.end(), tokens);
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

}  // namespace oryx::model
