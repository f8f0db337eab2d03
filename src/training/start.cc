#include "training/start.h"

#include <ATen/ATen.h>

#include "base/error.h"
#include "formats/json.h"
#include "operators/activations.h"
#include "training/sharding.h"

namespace oryx::training {

namespace fs = std::filesystem;

namespace {

Value identity_text(const DataIdentity& data) {
  return {fmt::format("{} tokens with checksum {:08x}", data.tokens, data.crc32c), {}};
}

// The recipe as ranks compare it: data by its content, wherever it lies.
Table facts(const Recipe& recipe, const DataIdentity& data, const std::optional<Validation>& validation) {
  Table table = recipe.to_table();
  set_path(table, "data.train", identity_text(data));
  if (validation) set_path(table, "data.validation", identity_text(validation->identity()));
  return table;
}

model::Weights load_or_draw(const Recipe& recipe, const std::optional<fs::path>& checkpoint) {
  if (checkpoint) return model::load_weights(*checkpoint, recipe.model, recipe.weight_dtype());
  const std::string& initial = recipe.training.initial_model;
  if (!initial.empty()) return model::load_weights(initial, recipe.model, recipe.weight_dtype());
  return model::initial_weights(recipe.model, static_cast<uint64_t>(recipe.run.seed), recipe.weight_dtype());
}

model::Weights empty_weights(const Recipe& recipe) {
  model::Weights weights;
  for (const model::ParameterSpec& spec : model::parameter_specs(recipe.model)) {
    weights.add(spec.name, at::empty(spec.shape, recipe.weight_dtype()));
  }
  return weights;
}

}  // namespace

Recipe for_data(Recipe recipe, const SequenceSource& data) {
  recipe.model.tokenizer = data.tokenizer() == "bytes" ? "bytes" : "tokenizer.json";
  return recipe;
}

Share agreed_share(const Recipe& recipe, const DataIdentity& data,
                   const std::optional<Validation>& validation, ProcessGroup* group) {
  const int64_t sequences = recipe.batch_sequences();
  if (group == nullptr) return {0, sequences};
  const Table ours = facts(recipe, data, validation);
  const std::string theirs = group->share("the recipe", formats::to_json(ours));
  const Value parsed = formats::parse_json(theirs, "the recipe of rank 0");
  if (const auto difference = first_difference_between_ranks(*parsed.as<Table>(), ours)) {
    fail("{} = {} on this rank, {} on rank 0: expected the same recipe and the same data on all ranks",
         difference->key, difference->wanted, difference->stored);
  }
  expect(sequences >= group->size(),
         "training.batch_tokens = {} holds {} sequences: expected at least one for each of {} ranks",
         recipe.training.batch_tokens, sequences, group->size());
  return share_of(sequences, group->rank(), group->size());
}

TrainingState matching_state(const fs::path& checkpoint, const Recipe& recipe, const DataIdentity& data) {
  TrainingState state = load_state(checkpoint);
  if (const auto difference = first_difference(state.recipe, recipe.to_table())) {
    fail(
        "{} = {}: the checkpoint {} was made with {}; use the recipe it was made with or another "
        "run.directory",
        difference->key, difference->wanted, checkpoint.string(), difference->stored);
  }
  expect(state.data == data, "data.train holds other tokens ({}) than the checkpoint {} was trained on ({})",
         data.tokens, checkpoint.string(), state.data.tokens);
  return state;
}

model::Weights starting_weights(const Recipe& recipe, const std::optional<fs::path>& checkpoint,
                                c10::Device device, ProcessGroup* group) {
  const bool reads = group == nullptr || group->leads();
  model::Weights weights = reads ? load_or_draw(recipe, checkpoint) : empty_weights(recipe);
  for (auto& [name, tensor] : weights.entries()) tensor = tensor.to(device).contiguous();
  if (group) {
    for (auto& [name, tensor] : weights.entries()) group->broadcast(tensor).finish();
  }
  return weights;
}

void restore_moments(const std::optional<fs::path>& checkpoint, bool shard, Optimizer& optimizer,
                     const model::Weights& weights, const GradientExchange* exchange, ProcessGroup* group) {
  if (group == nullptr) {
    if (checkpoint) load_moments(*checkpoint, optimizer.moments());
    return;
  }
  if (group->share("the moments", checkpoint ? "stored" : "zero") == "zero") return;
  if (!shard) {
    if (checkpoint) load_moments(*checkpoint, optimizer.moments());
    for (const auto& [name, tensor] : optimizer.moments()) group->broadcast(tensor).finish();
    return;
  }
  formats::NamedTensors whole;
  if (checkpoint) {
    for (const char* kind : {"first_moment.", "second_moment."}) {
      for (const auto& [name, tensor] : weights.entries()) {
        whole.emplace_back(kind + name,
                           at::empty(tensor.sizes(), operators::accumulate_type(tensor.scalar_type())));
      }
    }
    load_moments(*checkpoint, whole);
  }
  scatter_moments(whole, optimizer, weights, exchange->buckets(), *group);
}

}  // namespace oryx::training
