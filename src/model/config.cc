#include "model/config.h"

#include <algorithm>

#include <fmt/ranges.h>

#include "base/error.h"
#include "model/mixers/mixer.h"

namespace oryx::model {

namespace {
bool contains(const std::vector<std::string>& values, std::string_view value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

void expect_positive(std::string_view where, std::string_view key, int64_t value) {
  expect(value > 0, "{}: expected {} of at least 1, got {}", where, key, value);
}
}  // namespace

ModelConfig ModelConfig::with_mixers(std::vector<std::string> mixers) {
  ModelConfig config;
  config.mixers = std::move(mixers);
  for (const std::string& name : config.mixers) mixer_type(name);
  if (config.mixers.size() == 1 && config.mixers[0] == "attention") {  // Transformer++
    config.gate = false;
    config.short_conv = false;
    config.norm = "none";
    return config;
  }
  const bool baseline = config.mixers.size() == 1;
  if (contains(config.mixers, "gated_delta")) {
    config.conv_activation = "silu";
    config.norm = "per_head";
    config.norm_order = "before_gate";
    config.rope = baseline ? "none" : "attention";
    config.query_conv = baseline;
    // With a convolution on the query, its activation is the convolution's.
    config.gated_delta = {baseline ? "none" : "silu", "query_key"};
    config.attention = {"silu", "none"};
  } else if (baseline) {  // Mamba-2
    config.conv_activation = "silu";
    config.query_conv = true;
    config.conv_bias = true;
    config.rope = "none";
  }
  return config;
}

ModelConfig ModelConfig::read(const Table& table, std::string_view section) {
  // The mixers decide the defaults of everything else; what is wrong with them is for read_fields to say.
  std::vector<std::string> mixers;
  if (const Value* value = table.find("mixers")) fields::assign(*value, mixers);
  ModelConfig config = with_mixers(mixers);
  read_fields(config, table, section);
  const std::string where =
      section.empty() ? "model config" + table.origin.in() : fmt::format("[{}]", section);
  if (config.head_dim == 0 && config.heads > 0) {
    expect(config.width % config.heads == 0, "{}: width {} is no multiple of heads {}: give head_dim", where,
           config.width, config.heads);
    config.head_dim = config.width / config.heads;
  }
  if (config.kv_heads == 0) config.kv_heads = config.heads;
  if (config.value_heads == 0) config.value_heads = config.kv_heads;
  if (config.value_dim == 0) config.value_dim = config.head_dim;
  config.validate(where);
  return config;
}

void ModelConfig::validate(std::string_view where) const {
  expect_positive(where, "layers", layers);
  expect_positive(where, "width", width);
  expect_positive(where, "heads", heads);
  expect_positive(where, "head_dim", head_dim);
  expect_positive(where, "kv_heads", kv_heads);
  expect_positive(where, "value_heads", value_heads);
  expect_positive(where, "value_dim", value_dim);
  expect_positive(where, "mlp_width", mlp_width);
  expect_positive(where, "vocabulary", vocabulary);
  expect_positive(where, "conv_width", conv_width);
  expect(rope == "none" || head_dim % 2 == 0, "{}: RoPE needs an even head_dim, got {}", where, head_dim);
  expect(rope_base > 0, "{}: expected rope_base above 0, got {}", where, rope_base);
  expect(norm_eps > 0, "{}: expected norm_eps above 0, got {}", where, norm_eps);
  expect(format_version == 1, "{}: format_version {} is not known: this program reads 1", where,
         format_version);

  expect(!mixers.empty() && mixers.size() <= 2, "{}: expected one or two mixers, got {}", where,
         mixers.size());
  for (const std::string& name : mixers) mixer_type(name);
  if (mixers.size() == 2) {
    expect(contains(mixers, "attention") && (contains(mixers, "ssd") || contains(mixers, "gated_delta")),
           "{}: expected attention and one linear mixer (ssd or gated_delta), got {}", where,
           fmt::join(mixers, ", "));
  }
  expect(value_heads % kv_heads == 0, "{}: value_heads {} is no multiple of kv_heads {}", where, value_heads,
         kv_heads);
  expect(heads % value_heads == 0 || value_heads % heads == 0,
         "{}: expected heads to divide value_heads or the reverse, got {} and {}", where, heads, value_heads);
  if (contains(mixers, "attention")) {
    expect(value_heads == kv_heads, "{}: attention needs as many value heads as key heads, got {} and {}",
           where, value_heads, kv_heads);
    expect(heads % kv_heads == 0, "{}: heads {} is no multiple of kv_heads {}", where, heads, kv_heads);
  }
  expect(
      !query_conv || (short_conv && mixers.size() == 1),
      "{}: query_conv is for a single mixer with short_conv: a switchable block projects a query for its own "
      "tokens only",
      where);
  expect(hybrid == "none" || mixers.size() == 2, "{}: hybrid \"{}\" needs two mixers", where, hybrid);
  expect((hybrid == "inter_layer") == !layer_pattern.empty(),
         "{}: layer_pattern is needed with hybrid \"inter_layer\" and only there", where);
  for (const std::string& name : layer_pattern) {
    expect(contains(mixers, name), "{}: layer_pattern names {}, which is none of the mixers {}", where, name,
           fmt::join(mixers, ", "));
  }
}

std::vector<std::string> ModelConfig::layer_mixers(int64_t layer) const {
  if (hybrid != "inter_layer") return mixers;
  return {layer_pattern[layer % layer_pattern.size()]};
}

bool ModelConfig::has_mode(schedule::Mode mode) const {
  if (hybrid != "none") return true;  // every token takes the same path, whatever it is called
  for (const std::string& name : mixers) {
    if (mixer_type(name).mode == mode) return true;
  }
  return false;
}

}  // namespace oryx::model
