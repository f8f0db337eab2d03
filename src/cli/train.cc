// oryx train RECIPE.toml [section.key=value …]: alone, or as one of the processes that torchrun, srun or
// mpirun started.
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/ranks.h"
#include "formats/toml.h"
#include "training/launch.h"
#include "training/process_group.h"
#include "training/recipe.h"
#include "training/trainer.h"

namespace oryx::cli {

namespace {

struct TrainOptions {
  std::string recipe;
  std::vector<std::string> overrides;
  std::string device, dtype;
  std::optional<int64_t> seed;
  bool json = false;
};

void print_json(const training::Outcome& outcome, const std::string& directory) {
  nlohmann::ordered_json object;
  object["steps"] = outcome.steps;
  object["tokens"] = outcome.tokens;
  object["loss"] = outcome.loss ? nlohmann::ordered_json(*outcome.loss) : nlohmann::ordered_json();
  object["validation_loss"] = outcome.validation_loss;
  object["directory"] = directory;
  object["model"] = outcome.model.string();
  object["interrupted"] = outcome.interrupted;
  std::printf("%s\n", object.dump().c_str());
}

void print_text(const training::Outcome& outcome) {
  std::string losses;
  if (outcome.loss) losses += fmt::format(", training loss {:.4f}", *outcome.loss);
  for (const auto& [mode, loss] : outcome.validation_loss) {
    losses += fmt::format(", validation loss {} {:.4f}", mode, loss);
  }
  const char* state = outcome.interrupted        ? "interrupted"
                      : outcome.already_finished ? "already finished"
                                                 : "finished";
  fmt::print("{} after {} steps, {} tokens{}\n", state, outcome.steps, outcome.tokens, losses);
  if (!outcome.model.empty()) fmt::print("model: {}\n", outcome.model.string());
}

// Returns whether it was interrupted. `group` is null for a process on its own.
bool train(const TrainOptions& options, const training::Launch& launch, training::ProcessGroup* group) {
  Table root = formats::read_recipe(options.recipe);
  std::vector<std::string> overrides = options.overrides;
  if (!options.device.empty()) overrides.push_back("run.device=" + options.device);
  if (!options.dtype.empty()) overrides.push_back("training.dtype=" + options.dtype);
  if (options.seed) overrides.push_back(fmt::format("run.seed={}", *options.seed));
  formats::apply_overrides(root, overrides);
  const training::Recipe recipe = training::read_recipe(root, options.recipe);

  ComputeOptions compute;
  compute.device = recipe.run.device;
  compute.dtype = recipe.training.dtype;
  compute.resolve_dtype();
  const c10::Device device = device_of(launch, compute.resolve_device());
  watch_for_interrupt();
  if (group) group->start(device, std::chrono::seconds(recipe.training.timeout_seconds));
  const training::Outcome outcome = training::train(recipe, device, interrupted(), group);
  if (group) group->leave();
  if (!group || group->leads()) {
    options.json ? print_json(outcome, recipe.run.directory) : print_text(outcome);
    std::fflush(stdout);
  }
  return outcome.interrupted;
}

void train(const TrainOptions& options) {
  bool was_interrupted = false;
  as_launched([&](const training::Launch& launch, training::ProcessGroup* group) {
    was_interrupted = train(options, launch, group);
  });
  if (was_interrupted) throw Interrupted{};
}

}  // namespace

void add_train(CLI::App& app) {
  auto options = std::make_shared<TrainOptions>();
  CLI::App* command =
      app.add_subcommand("train", "Train a model as a recipe says, or go on where its run stopped");
  command->add_option("recipe", options->recipe, "recipe file (TOML)")->required();
  command->add_option("overrides", options->overrides, "section.key=value, over what the recipe says");
  command->add_option("--device", options->device, "cpu, cuda or auto: run.device")
      ->check(CLI::IsMember({"cpu", "cuda", "auto"}));
  command->add_option("--dtype", options->dtype, "float32, bfloat16 or float64: training.dtype")
      ->check(CLI::IsMember({"float32", "bfloat16", "float64"}));
  command->add_option("--seed", options->seed, "run.seed");
  command->add_flag("--json", options->json, "print the outcome as one JSON object");
  command->callback([options] { train(*options); });
}

}  // namespace oryx::cli
