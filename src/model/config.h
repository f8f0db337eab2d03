// The architecture of a model as data: the [model] section of a recipe and config.json.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/config_fields.h"
#include "schedule/schedule.h"

namespace oryx::model {

// What differs between the mixers of one block beside their weights.
struct MixerOptions {
  std::string query_activation = "none";  // "none" | "silu", after the query projection, before RoPE and L2
  std::string l2_norm = "none";           // "none" | "key" | "query_key": x / sqrt(Σx² + 1e-6) per head
};

struct ModelConfig {
  // Sizes. Output heads are max(heads, value_heads); the block's inner width is output heads · value_dim.
  int64_t layers = 0;
  int64_t width = 0;
  int64_t heads = 0;        // query heads
  int64_t head_dim = 0;     // of queries and keys; default width / heads
  int64_t kv_heads = 0;     // key heads, and value heads unless value_heads says otherwise; default heads
  int64_t value_heads = 0;  // state heads of a linear mixer; default kv_heads
  int64_t value_dim = 0;    // default head_dim
  int64_t mlp_width = 0;
  int64_t vocabulary = 0;  // rows of the embedding, padding included
  std::vector<std::string> mixers;

  // Cells of the block; the defaults depend on the mixers (with_mixers).
  bool gate = true;
  bool short_conv = true;   // depthwise causal convolution of keys and values
  bool query_conv = false;  // and of queries (the single-mixer baselines)
  bool conv_bias = false;
  int64_t conv_width = 4;
  std::string conv_activation = "none";   // "none" | "silu"
  std::string norm = "full";              // "full" | "per_head" | "none"
  std::string norm_order = "after_gate";  // norm "after_gate" or "before_gate"
  std::string rope = "all";               // "all" | "attention" | "none"
  bool shared_query = false;              // one query projection for every mixer
  MixerOptions attention, ssd, gated_delta;

  // Static comparators. "inter_layer": layer n has the one mixer layer_pattern[n mod size].
  // "intra_layer": every mixer serves every token and their normalised outputs are averaged.
  std::string hybrid = "none";
  std::vector<std::string> layer_pattern;

  double rope_base = 10000.0;
  double norm_eps = 1e-5;

  std::string tokenizer = "bytes";  // "bytes", or "tokenizer.json" beside the config
  int64_t format_version = 1;

  // A config with the defaults that these mixers have: model.md's TM column for attention with ssd, TG's
  // for attention with gated_delta, the published baseline for a single mixer.
  static ModelConfig with_mixers(std::vector<std::string> mixers);

  // Reads the [model] section of a recipe (section "model") or config.json (section ""), fills the sizes left
  // out and validates. Throws Error naming the key, the value and what was expected.
  static ModelConfig read(const Table& table, std::string_view section);

  // `where` begins the message of an Error.
  void validate(std::string_view where) const;

  template <class Visitor>
  void visit_fields(Visitor& visitor);

  int64_t output_heads() const { return heads > value_heads ? heads : value_heads; }
  int64_t inner_width() const { return output_heads() * value_dim; }
  // The mixers of layer n: all of them, or the one of the pattern.
  std::vector<std::string> layer_mixers(int64_t layer) const;
  bool has_mode(schedule::Mode mode) const;
  // Whether a token's mode decides anything: several mixers in a block, one of them chosen per token.
  bool is_switchable() const { return mixers.size() > 1 && hybrid == "none"; }
};

template <class Visitor>
void ModelConfig::visit_fields(Visitor& visitor) {
  visitor.required("layers", layers, "number of layers");
  visitor.required("width", width, "width of the residual stream");
  visitor.required("heads", heads, "query heads");
  visitor("head_dim", head_dim, "dimension of a query or key head (0: width / heads)");
  visitor("kv_heads", kv_heads, "key heads (0: as many as query heads)");
  visitor("value_heads", value_heads, "value heads (0: as many as key heads)");
  visitor("value_dim", value_dim, "dimension of a value head (0: head_dim)");
  visitor.required("mlp_width", mlp_width, "inner width of the SwiGLU MLP");
  visitor.required("vocabulary", vocabulary, "rows of the embedding, padding included");
  visitor.required("mixers", mixers, "mixers of a block: attention, ssd, gated_delta");
  visitor("gate", gate, "multiply the mixer's output by SiLU(X W_G)");
  visitor("short_conv", short_conv, "depthwise causal convolution of keys and values");
  visitor("query_conv", query_conv, "the same convolution on queries (baselines)");
  visitor("conv_bias", conv_bias, "bias in the convolutions (baselines)");
  visitor("conv_width", conv_width, "taps of the convolution");
  visitor.choice("conv_activation", conv_activation, {"none", "silu"}, "after the convolution");
  visitor.choice("norm", norm, {"full", "per_head", "none"}, "RMSNorm of the mixer's output");
  visitor.choice("norm_order", norm_order, {"after_gate", "before_gate"}, "norm before or after the gate");
  visitor.choice("rope", rope, {"all", "attention", "none"}, "who reads rotated queries and keys");
  visitor("shared_query", shared_query, "one query projection for every mixer");
  visitor.choice("attention.query_activation", attention.query_activation, {"none", "silu"}, "");
  visitor.choice("attention.l2_norm", attention.l2_norm, {"none", "key", "query_key"}, "");
  visitor.choice("ssd.query_activation", ssd.query_activation, {"none", "silu"}, "");
  visitor.choice("ssd.l2_norm", ssd.l2_norm, {"none", "key", "query_key"}, "");
  visitor.choice("gated_delta.query_activation", gated_delta.query_activation, {"none", "silu"}, "");
  visitor.choice("gated_delta.l2_norm", gated_delta.l2_norm, {"none", "key", "query_key"}, "");
  visitor.choice("hybrid", hybrid, {"none", "inter_layer", "intra_layer"}, "static comparators");
  visitor("layer_pattern", layer_pattern, "inter_layer: the mixers of successive layers");
  visitor("rope_base", rope_base, "base of the rotation angles");
  visitor("norm_eps", norm_eps, "epsilon of every RMSNorm");
  visitor("tokenizer", tokenizer, "bytes, or tokenizer.json beside the config");
  visitor("format_version", format_version, "version of this directory's layout");
}

}  // namespace oryx::model
