#include "model/config.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "formats/json.h"
#include "formats/toml.h"
#include "model/cost.h"
#include "model/weights.h"

namespace oryx::model {
namespace {

using schedule::Mode;

ModelConfig read(const std::string& text) {
  return ModelConfig::read(formats::parse_toml(text, "test"), "model");
}

const char* const kSizes = "layers = 2\nwidth = 256\nheads = 2\nmlp_width = 704\nvocabulary = 320\n";

TEST(ModelConfig, DefaultsAreTheColumnsOfTheMixers) {
  const ModelConfig tm = read(std::string(kSizes) + "mixers = ['attention', 'ssd']");
  EXPECT_EQ(tm.head_dim, 128);
  EXPECT_EQ(tm.kv_heads, 2);
  EXPECT_EQ(tm.conv_activation, "none");
  EXPECT_EQ(tm.attention.query_activation, "none");
  EXPECT_EQ(tm.rope, "all");
  EXPECT_EQ(tm.norm, "full");
  EXPECT_EQ(tm.norm_order, "after_gate");
  EXPECT_EQ(tm.ssd.l2_norm, "none");

  const ModelConfig tg = read(std::string(kSizes) + "mixers = ['attention', 'gated_delta']");
  EXPECT_EQ(tg.conv_activation, "silu");
  EXPECT_EQ(tg.attention.query_activation, "silu");
  EXPECT_EQ(tg.gated_delta.query_activation, "silu");
  EXPECT_EQ(tg.rope, "attention");
  EXPECT_EQ(tg.norm, "per_head");
  EXPECT_EQ(tg.norm_order, "before_gate");
  EXPECT_EQ(tg.gated_delta.l2_norm, "query_key");
  EXPECT_EQ(tg.attention.l2_norm, "none");

  const ModelConfig transformer = read(std::string(kSizes) + "mixers = ['attention']");
  EXPECT_FALSE(transformer.gate);
  EXPECT_FALSE(transformer.short_conv);
  EXPECT_EQ(transformer.norm, "none");
  EXPECT_EQ(transformer.rope, "all");
}

TEST(ModelConfig, FlatAndNestedKeysReadAlike) {
  const std::string base = std::string(kSizes) + "mixers = ['attention', 'ssd']\n";
  EXPECT_EQ(read(base + "attention.query_activation = 'silu'").attention.query_activation, "silu");
  EXPECT_EQ(read(base + "'attention.query_activation' = 'silu'").attention.query_activation, "silu");
  EXPECT_EQ(read(base + "[attention]\nquery_activation = 'silu'").attention.query_activation, "silu");
}

TEST(ModelConfig, ComesBackFromItsOwnJson) {
  const ModelConfig config =
      read(std::string(kSizes) + "mixers = ['attention', 'gated_delta']\nkv_heads = 1");
  const std::string json = formats::to_json(field_table(config), 2);
  const Value parsed = formats::parse_json(json, "config.json");
  EXPECT_EQ(formats::to_json(field_table(ModelConfig::read(*parsed.as<Table>(), "")), 2), json);
}

void expect_error(const std::string& text, const std::string& part) {
  try {
    read(text);
    FAIL() << "accepted: " << text;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(ModelConfig, ErrorsNameTheKeyAndWhatWasExpected) {
  const std::string sizes = kSizes, tm = sizes + "mixers = ['attention', 'ssd']\n";
  expect_error(sizes + "mixers = ['atention']", "attention");
  expect_error(sizes + "mixers = ['ssd', 'gated_delta']", "expected attention and one linear mixer");
  expect_error(sizes + "mixers = []", "expected one or two mixers");
  expect_error(tm + "widht = 3", "width");
  expect_error(tm + "norm = 'group'", "full");
  expect_error(tm + "head_dim = 5", "even");
  expect_error(tm + "kv_heads = 3", "");
  expect_error(tm + "query_conv = true", "query_conv");
  expect_error(tm + "hybrid = 'inter_layer'", "layer_pattern");
  expect_error(tm + "format_version = 2", "format_version");
  expect_error("mixers = ['attention']\nlayers = 0\nwidth = 4\nheads = 1\nmlp_width = 4\nvocabulary = 4",
               "layers");
  expect_error("mixers = ['attention']", "layers");
}

std::filesystem::path recipe(const std::string& name) {
  return std::filesystem::path(ORYX_SOURCE_DIR) / "recipes" / (name + ".toml");
}

ModelConfig from_recipe(const std::string& name) {
  return ModelConfig::read(section(formats::read_recipe(recipe(name).string()), "model"), "model");
}

TEST(Recipes, EveryFileIsAValidModel) {
  int files = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(recipe("x").parent_path())) {
    if (entry.path().extension() != ".toml") continue;
    const ModelConfig config =
        ModelConfig::read(section(formats::read_recipe(entry.path().string()), "model"), "model");
    EXPECT_FALSE(parameter_specs(config).empty()) << entry.path();
    ++files;
  }
  EXPECT_GT(files, 50);
}

TEST(Recipes, SizesAndTiedSharesAreThePapers) {
  for (const auto& [size, millions] : std::vector<std::pair<std::string, double>>{
           {"35m", 34.7}, {"130m", 131}, {"380m", 380.7}, {"810m", 814}, {"1.4b", 1419}}) {
    for (const std::string variant : {"oryx-tm-", "oryx-tg-"}) {
      const ParameterCount count = count_parameters(from_recipe(variant + size));
      EXPECT_NEAR(static_cast<double>(count.active(Mode::attention)) * 1e-6, millions, 0.005 * millions)
          << size;
      EXPECT_NEAR(count.tied_share_of_mode(Mode::attention), 0.923, 0.002) << size;
      EXPECT_NEAR(count.tied_share_of_mode(Mode::linear), 0.923, 0.002) << size;
      EXPECT_NEAR(count.tied_share_of_stored(), 0.857, 0.003) << size;
    }
  }
}

TEST(Recipes, BaselinesMatchTheActiveParameters) {
  for (const std::string size : {"tiny", "35m", "130m", "380m", "810m", "1.4b"}) {
    const double target =
        static_cast<double>(count_parameters(from_recipe("oryx-tm-" + size)).active(Mode::linear));
    for (const std::string baseline : {"transformer-", "mamba2-", "gated-deltanet-"}) {
      const double stored = static_cast<double>(count_parameters(from_recipe(baseline + size)).total);
      EXPECT_NEAR(stored / target, 1, 0.01) << baseline << size;
    }
  }
}

TEST(Cost, FollowsTheFormulas) {
  ModelConfig config = from_recipe("oryx-tm-130m");
  const int64_t tokens = 4096;
  const schedule::ModeSpans linear = {{0, tokens, Mode::linear}}, attention = {{0, tokens, Mode::attention}};
  const double t = tokens, heads = 12 * 6, d = 128, c = 128;
  const Flops l = count_flops(config, linear), a = count_flops(config, attention);
  EXPECT_DOUBLE_EQ(l.state_update, heads * 2 * t * d * d * (1 + 1 / c));
  EXPECT_DOUBLE_EQ(l.linear_output, heads * (2 * t * c * 2 * d + 2 * t * d * d));
  EXPECT_DOUBLE_EQ(l.attention, 0);
  EXPECT_DOUBLE_EQ(a.attention, heads * t * (t + 1) * 2 * d);
  EXPECT_DOUBLE_EQ(a.state_update, l.state_update);
  EXPECT_DOUBLE_EQ(a.linear_output, 0);
  const Flops half = count_flops(config, {{0, 2048, Mode::linear}, {2048, tokens, Mode::attention}});
  EXPECT_DOUBLE_EQ(half.linear_output, 0.5 * l.linear_output);
}

TEST(Cost, StateBytes) {
  const StateBytes tm = count_state_bytes(from_recipe("oryx-tm-130m"), at::kBFloat16);
  EXPECT_EQ(tm.per_token, 12 * 2 * 768 * 2);
  EXPECT_EQ(tm.per_sequence, 12 * (128 * 768 * 4 + 3 * 2 * 768 * 2));
  EXPECT_EQ(count_state_bytes(from_recipe("transformer-130m"), at::kFloat).per_sequence, 0);
  EXPECT_EQ(count_state_bytes(from_recipe("mamba2-130m"), at::kFloat).per_token, 0);
}

}  // namespace
}  // namespace oryx::model
