#include "model/cost.h"

#include <algorithm>

#include "model/mixers/mixer.h"
#include "model/weights.h"

namespace oryx::model {

int64_t ParameterCount::active(schedule::Mode mode) const {
  return total - (mode == schedule::Mode::attention ? blocks_linear : blocks_attention);
}

double ParameterCount::tied_share_of_mode(schedule::Mode mode) const {
  const int64_t own = mode == schedule::Mode::attention ? blocks_attention : blocks_linear;
  return static_cast<double>(blocks_shared) / static_cast<double>(blocks_shared + own);
}

double ParameterCount::tied_share_of_stored() const {
  return static_cast<double>(blocks_shared) /
         static_cast<double>(blocks_shared + blocks_attention + blocks_linear);
}

ParameterCount count_parameters(const ModelConfig& config) {
  ParameterCount count;
  for (const ParameterSpec& spec : parameter_specs(config)) {
    count.total += spec.size();
    if (spec.name == "embedding.weight") count.embedding += spec.size();
    if (!spec.name.starts_with("layers.")) continue;
    const bool own = config.is_switchable() && !spec.mixer.empty();
    (!own                        ? count.blocks_shared
     : spec.mixer == "attention" ? count.blocks_attention
                                 : count.blocks_linear) += spec.size();
  }
  return count;
}

StateBytes count_state_bytes(const ModelConfig& config, at::ScalarType dtype) {
  const int64_t element = static_cast<int64_t>(c10::elementSize(dtype)), wide = std::max<int64_t>(4, element);
  StateBytes bytes;
  for (int64_t n = 0; n < config.layers; ++n) {
    const int64_t key_channels = config.kv_heads * config.head_dim;
    const int64_t value_channels = config.value_heads * config.value_dim;
    for (const std::string& name : config.layer_mixers(n)) {
      if (mixer_type(name).mode == schedule::Mode::attention) {
        bytes.per_token += element * (key_channels + value_channels);
      } else {
        bytes.per_sequence += wide * config.value_heads * config.head_dim * config.value_dim;
      }
    }
    if (config.short_conv) {
      const int64_t query_channels = config.query_conv ? config.heads * config.head_dim : 0;
      bytes.per_sequence +=
          element * (config.conv_width - 1) * (key_channels + value_channels + query_channels);
    }
  }
  return bytes;
}

Flops count_flops(const ModelConfig& config, const schedule::ModeSpans& spans, int64_t chunk) {
  const double tokens = static_cast<double>(schedule::total_tokens(spans));
  const double attention_tokens = static_cast<double>(schedule::attention_tokens(spans));
  double attention_pairs = 0;  // Σ (t + 1) over attention tokens
  for (const schedule::ModeSpan& span : spans) {
    if (span.mode != schedule::Mode::attention) continue;
    attention_pairs +=
        0.5 * static_cast<double>(span.end - span.begin) * static_cast<double>(span.begin + span.end + 1);
  }

  Flops flops;
  for (const ParameterSpec& spec : parameter_specs(config)) {
    if (!spec.is_matrix) continue;
    double readers = tokens;
    if (config.is_switchable() && spec.name.ends_with("query.weight") && !spec.mixer.empty()) {
      readers = spec.mixer == "attention" ? attention_tokens : tokens - attention_tokens;
    }
    flops.weights += 2.0 * readers * static_cast<double>(spec.size());
  }
  const double keys = static_cast<double>(config.head_dim), values = static_cast<double>(config.value_dim);
  const double c = static_cast<double>(chunk);
  for (int64_t n = 0; n < config.layers; ++n) {
    for (const std::string& name : config.layer_mixers(n)) {
      if (mixer_type(name).mode == schedule::Mode::attention) {
        const double pairs = config.is_switchable() ? attention_pairs : 0.5 * tokens * (tokens + 1);
        flops.attention += static_cast<double>(config.heads) * 2.0 * pairs * (keys + values);
      } else {
        const double readers = config.is_switchable() ? tokens - attention_tokens : tokens;
        flops.state_update +=
            static_cast<double>(config.value_heads) * 2.0 * tokens * keys * values * (1 + 1 / c);
        flops.linear_output += static_cast<double>(config.output_heads()) *
                               (2.0 * readers * c * (keys + values) + 2.0 * readers * keys * values);
      }
    }
  }
  return flops;
}

}  // namespace oryx::model
