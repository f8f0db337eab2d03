// oryx inspect: what a model is and costs, from its config alone.
#include <fmt/ranges.h>

#include <filesystem>
#include <memory>
#include <optional>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/model_source.h"
#include "cli/options.h"
#include "formats/json.h"
#include "formats/toml.h"
#include "model/cost.h"
#include "training/memory.h"
#include "training/recipe.h"

namespace oryx::cli {

namespace {

using schedule::Mode;

struct Options {
  std::string source;
  std::vector<std::string> overrides;
  std::vector<std::string> schedules;
  std::vector<int64_t> lengths = {2048, 4096, 16384, 65536};
  std::string dtype = "float32";
  int64_t ranks = 0;
  bool json = false;
};

// What training by a recipe on some ranks keeps on each.
struct RanksCost {
  int64_t ranks = 1;
  bool sharded = false;
  training::RankMemory memory;
};

struct Cost {
  std::string schedule;
  int64_t length;
  double attention_share;
  model::Flops flops;
};

std::string count_text(int64_t count) {
  if (count >= 1'000'000'000) return fmt::format("{:.3f}B", static_cast<double>(count) * 1e-9);
  if (count >= 1'000'000) return fmt::format("{:.1f}M", static_cast<double>(count) * 1e-6);
  return fmt::format("{}", count);
}

std::vector<std::string> default_schedules(const model::ModelConfig& config) {
  if (config.is_switchable()) return {"attention", "linear", "linear,attention@97.5%", "random(0.25)"};
  return {config.has_mode(Mode::attention) ? "attention" : "linear"};
}

RanksCost count_ranks(const Options& options) {
  if (options.ranks < 0) fail_usage("expected --ranks of at least 1, got {}", options.ranks);
  if (std::filesystem::is_directory(options.source)) {
    fail_usage("--ranks is about training: {} is a model, expected a recipe", options.source);
  }
  Table root = formats::read_recipe(options.source);
  formats::apply_overrides(root, options.overrides);
  const training::Recipe recipe = training::read_recipe(root, options.source);
  const bool sharded = recipe.training.shard_optimizer && options.ranks > 1;
  return {options.ranks, sharded,
          training::rank_memory(recipe.model, recipe.compute_dtype(), options.ranks, sharded)};
}

void print_ranks(const RanksCost& cost) {
  const training::RankMemory& memory = cost.memory;
  fmt::print("\nbytes that training keeps on each of {} ranks, beside activations\n", cost.ranks);
  fmt::print("weights                {} ({})\n", memory.weights, count_text(memory.weights));
  if (memory.masters > 0) {
    fmt::print("float32 originals      {} ({}), a part of them on each rank\n", memory.masters,
               count_text(memory.masters));
  }
  fmt::print("gradients              {} ({})\n", memory.gradients, count_text(memory.gradients));
  fmt::print("moments                {} ({}), {}\n", memory.moments, count_text(memory.moments),
             cost.sharded ? "a part of them on each rank" : "all of them on every rank");
}

void print_table(const model::ModelConfig& config, const model::ParameterCount& parameters,
                 const model::StateBytes& state, const std::vector<Cost>& costs) {
  fmt::print("mixers                 {}{}\n", fmt::join(config.mixers, " + "),
             config.hybrid == "none" ? "" : " (" + config.hybrid + ")");
  fmt::print("layers × width         {} × {}, {} query heads of {}, {} value heads of {}, MLP {}\n",
             config.layers, config.width, config.heads, config.head_dim, config.value_heads, config.value_dim,
             config.mlp_width);
  fmt::print("parameters             {} stored ({}), of them {} embedding\n", parameters.total,
             count_text(parameters.total), count_text(parameters.embedding));
  for (const Mode mode : {Mode::attention, Mode::linear}) {
    if (!config.has_mode(mode)) continue;
    fmt::print("active in {:<12} {} ({})\n", schedule::mode_name(mode), parameters.active(mode),
               count_text(parameters.active(mode)));
  }
  if (config.is_switchable()) {
    fmt::print("tied block weights     {:.1f}% of those a mode reads (attention {:.2f}%, linear {:.2f}%)\n",
               100 * parameters.tied_share_of_mode(Mode::attention),
               100 * parameters.tied_share_of_mode(Mode::attention),
               100 * parameters.tied_share_of_mode(Mode::linear));
    fmt::print("                       {:.1f}% of all stored block weights\n",
               100 * parameters.tied_share_of_stored());
  }
  fmt::print(
      "state                  {} bytes a token (keys and values), {} bytes a sequence (recurrence, "
      "convolutions)\n",
      state.per_token, state.per_sequence);
  fmt::print("\nfloating-point operations of one forward pass, GFLOP\n");
  fmt::print("{:>8}  {:<26} {:>9} {:>12} {:>10} {:>10} {:>10} {:>12}\n", "tokens", "schedule", "attention",
             "weights", "state", "linear", "attention", "total");
  for (const Cost& cost : costs) {
    fmt::print("{:>8}  {:<26} {:>8.1f}% {:>12.1f} {:>10.2f} {:>10.2f} {:>10.1f} {:>12.1f}\n", cost.length,
               cost.schedule, 100 * cost.attention_share, cost.flops.weights * 1e-9,
               cost.flops.state_update * 1e-9, cost.flops.linear_output * 1e-9, cost.flops.attention * 1e-9,
               cost.flops.total() * 1e-9);
  }
}

Table to_table(const model::ModelConfig& config, const model::ParameterCount& parameters,
               const model::StateBytes& state, const std::vector<Cost>& costs) {
  Table table;
  table.set("config", Value{field_table(config)});
  table.set("parameters", Value{parameters.total});
  table.set("embedding_parameters", Value{parameters.embedding});
  for (const Mode mode : {Mode::attention, Mode::linear}) {
    if (!config.has_mode(mode)) continue;
    const std::string name(schedule::mode_name(mode));
    table.set("active_parameters_" + name, Value{parameters.active(mode)});
    if (config.is_switchable()) table.set("tied_share_" + name, Value{parameters.tied_share_of_mode(mode)});
  }
  if (config.is_switchable()) table.set("tied_share_stored", Value{parameters.tied_share_of_stored()});
  table.set("state_bytes_per_token", Value{state.per_token});
  table.set("state_bytes_per_sequence", Value{state.per_sequence});
  Array flops;
  for (const Cost& cost : costs) {
    Table row;
    row.set("schedule", Value{cost.schedule});
    row.set("tokens", Value{cost.length});
    row.set("attention_share", Value{cost.attention_share});
    row.set("weights", Value{cost.flops.weights});
    row.set("state_update", Value{cost.flops.state_update});
    row.set("linear_output", Value{cost.flops.linear_output});
    row.set("attention", Value{cost.flops.attention});
    row.set("total", Value{cost.flops.total()});
    flops.push_back(Value{row});
  }
  table.set("flops", Value{flops});
  return table;
}

void inspect(const Options& options) {
  const model::ModelConfig config = read_model_config(options.source, options.overrides);
  ComputeOptions compute;
  compute.dtype = options.dtype;
  compute.device = "cpu";
  const std::vector<std::string> schedules =
      options.schedules.empty() ? default_schedules(config) : options.schedules;
  std::vector<Cost> costs;
  for (const int64_t length : options.lengths) {
    if (length < 1) fail_usage("expected --length of at least 1, got {}", length);
    for (const std::string& text : schedules) {
      const schedule::Schedule schedule = schedule::Schedule::parse(text);
      const schedule::ModeSpans spans = schedule.spans(length, length);
      costs.push_back(
          {schedule.text(), length, schedule::attention_share(spans), model::count_flops(config, spans)});
    }
  }
  const model::ParameterCount parameters = model::count_parameters(config);
  const model::StateBytes state = model::count_state_bytes(config, compute.resolve_dtype());
  std::optional<RanksCost> ranks;
  if (options.ranks != 0) ranks = count_ranks(options);
  if (options.json) {
    Table table = to_table(config, parameters, state, costs);
    if (ranks) {
      Table row;
      row.set("ranks", Value{ranks->ranks});
      row.set("sharded", Value{ranks->sharded});
      row.set("weights", Value{ranks->memory.weights});
      row.set("masters", Value{ranks->memory.masters});
      row.set("gradients", Value{ranks->memory.gradients});
      row.set("moments", Value{ranks->memory.moments});
      table.set("bytes_per_rank", Value{row});
    }
    fmt::print("{}\n", formats::to_json(table, 2));
  } else {
    print_table(config, parameters, state, costs);
    if (ranks) print_ranks(*ranks);
  }
}

}  // namespace

void add_inspect(CLI::App& app) {
  CLI::App* command = app.add_subcommand("inspect", "Print parameters, tied share, state bytes and FLOPs");
  const auto options = std::make_shared<Options>();
  command->add_option("source", options->source, "a model directory or a recipe")->required();
  command->add_option("overrides", options->overrides, "section.key=value, for a recipe");
  command->add_option("--schedule", options->schedules, "schedules to cost (default: a selection)");
  command->add_option("--length", options->lengths, "sequence lengths")->capture_default_str();
  command->add_option("--dtype", options->dtype, "type of the caches: float32, bfloat16, float64")
      ->capture_default_str();
  command->add_option("--ranks", options->ranks, "bytes on each rank when so many train by this recipe");
  command->add_flag("--json", options->json, "machine-readable");
  command->callback([options] { inspect(*options); });
}

}  // namespace oryx::cli
