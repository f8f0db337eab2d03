#include "training/recipe.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "base/config_fields.h"
#include "base/error.h"
#include "formats/json.h"
#include "schedule/schedule.h"
#include "schedule/training_draw.h"

namespace oryx::training {

namespace {

constexpr int64_t kDefaultTokens = 100'000'000'000;
constexpr int64_t kMicroBatchTokens = 8192;

// The later layer wins: the command line over the recipe over its bases. Two bases of one chain are not told
// apart, and neither are two keys of one file.
int layer(const Value& value, const std::string& recipe_file) {
  if (value.origin.source == nullptr || value.origin.line == 0) return 2;
  return *value.origin.source == recipe_file ? 1 : 0;
}

// Forgets the inherited one of tokens and steps.
Table with_one_duration(Table training, const std::string& recipe_file) {
  const Value* tokens = training.find("tokens");
  const Value* steps = training.find("steps");
  if (tokens == nullptr || steps == nullptr) return training;
  const int tokens_layer = layer(*tokens, recipe_file), steps_layer = layer(*steps, recipe_file);
  expect(tokens_layer != steps_layer,
         "training.tokens = {}{} and training.steps = {}{}: expected only one of them", tokens->text(),
         tokens->origin.in(), steps->text(), steps->origin.in());
  const std::string_view inherited = tokens_layer < steps_layer ? "tokens" : "steps";
  std::erase_if(training.entries, [&](const Entry& entry) { return entry.key == inherited; });
  return training;
}

template <class Number>
void expect_range(std::string_view key, Number value, bool in_range, std::string_view expected) {
  expect(in_range, "{} = {}: expected {}", key, value, expected);
}

void resolve_duration(TrainingOptions& training) {
  expect_range("training.steps", training.steps, training.steps >= 0, "at least 1");
  expect_range("training.tokens", training.tokens, training.tokens >= 0, "at least 1");
  if (training.steps > 0) return;
  if (training.tokens == 0) training.tokens = kDefaultTokens;
  expect(training.tokens >= training.batch_tokens,
         "training.tokens = {}: expected at least one batch of training.batch_tokens = {}", training.tokens,
         training.batch_tokens);
}

void validate_data(const Recipe& recipe) {
  const DataOptions& data = recipe.data;
  expect(!data.train.empty(), "data.train = []: expected at least one shard directory");
  expect_range("data.sequence_length", data.sequence_length, data.sequence_length >= 1, "at least 1");
}

void validate_schedule(const Recipe& recipe) {
  const ScheduleOptions& options = recipe.schedule;
  expect_range("schedule.attention_probability", options.attention_probability,
               options.attention_probability >= 0 && options.attention_probability <= 1, "0 … 1");
  expect_range("schedule.chunk", options.chunk, options.chunk >= 1, "at least 1");
  if (options.fixed.empty()) return;
  const int64_t length = recipe.data.sequence_length;
  schedule::ModeSpans spans;
  try {
    spans = schedule::Schedule::parse(options.fixed).spans(length, length);
  } catch (const Error& error) {
    fail("schedule.fixed: {}", error.what());
  }
  for (const schedule::ModeSpan& span : spans) {
    expect(recipe.model.has_mode(span.mode),
           "schedule.fixed = \"{}\" asks for {}, but the model's mixers are {}", options.fixed,
           schedule::mode_name(span.mode), fmt::join(recipe.model.mixers, ", "));
  }
}

void validate_training(const Recipe& recipe) {
  const TrainingOptions& t = recipe.training;
  const int64_t length = recipe.data.sequence_length;
  expect(t.batch_tokens >= length && t.batch_tokens % length == 0,
         "training.batch_tokens = {}: expected a multiple of data.sequence_length = {}", t.batch_tokens,
         length);
  expect_range("training.micro_batch", t.micro_batch, t.micro_batch >= 0, "at least 1 sequence");
  expect_range("training.learning_rate", t.learning_rate,
               t.learning_rate > 0 && std::isfinite(t.learning_rate), "a number above 0");
  expect(t.minimum_learning_rate >= 0 && std::isfinite(t.minimum_learning_rate),
         "training.minimum_learning_rate = {}: expected a number of at least 0", t.minimum_learning_rate);
  expect_range("training.warmup_fraction", t.warmup_fraction,
               t.warmup_fraction >= 0 && t.warmup_fraction <= 1, "0 … 1");
  expect_range("training.beta1", t.beta1, t.beta1 >= 0 && t.beta1 < 1, "0 ≤ beta1 < 1");
  expect_range("training.beta2", t.beta2, t.beta2 >= 0 && t.beta2 < 1, "0 ≤ beta2 < 1");
  expect_range("training.weight_decay", t.weight_decay, t.weight_decay >= 0, "at least 0");
  expect_range("training.clip", t.clip, t.clip >= 0, "at least 0");
  expect_range("training.validation_every", t.validation_every, t.validation_every >= 0, "at least 0");
  expect_range("training.validation_sequences", t.validation_sequences, t.validation_sequences >= 0,
               "at least 0");
  expect_range("training.checkpoint_every", t.checkpoint_every, t.checkpoint_every >= 0, "at least 0");
  expect_range("training.checkpoints_to_keep", t.checkpoints_to_keep, t.checkpoints_to_keep >= 1,
               "at least 1");
  expect_range("training.timeout_seconds", t.timeout_seconds,
               t.timeout_seconds >= 1 && t.timeout_seconds <= 1'000'000, "1 … 1000000");
}

// Keys that do not reach the weights of any step.
const std::set<std::string_view> kHarmlessKeys = {
    "data.train",  // compared by content
    "data.validation",
    "training.validation_every",
    "training.validation_sequences",
    "training.validation_mixed",
    "training.checkpoint_every",
    "training.checkpoints_to_keep",
    "training.shard_optimizer",
    "training.timeout_seconds",
    "run.directory",
    "run.device",
};

int64_t total_steps(const Table& flat_recipe) {
  const auto integer = [&](const char* key) {
    const Value* value = flat_recipe.find(key);
    return value != nullptr && value->as<int64_t>() != nullptr ? *value->as<int64_t>() : 0;
  };
  const int64_t steps = integer("training.steps");
  return steps > 0 ? steps
                   : integer("training.tokens") / std::max<int64_t>(integer("training.batch_tokens"), 1);
}

}  // namespace

at::ScalarType Recipe::compute_dtype() const {
  if (training.dtype == "bfloat16") return at::kBFloat16;
  return weight_dtype();
}

at::ScalarType Recipe::weight_dtype() const { return training.dtype == "float64" ? at::kDouble : at::kFloat; }

schedule::ModeSpans Recipe::training_spans(int64_t step, int64_t sequence) const {
  const int64_t length = data.sequence_length;
  if (!schedule.fixed.empty()) return schedule::Schedule::parse(schedule.fixed).spans(length, length);
  if (!model.is_switchable()) {
    const bool attends = model.has_mode(schedule::Mode::attention);
    return {{0, length, attends ? schedule::Mode::attention : schedule::Mode::linear}};
  }
  const schedule::TrainingDraw draw{schedule.attention_probability, schedule.chunk,
                                    schedule.per == "sequence"};
  return schedule::draw(draw, length, static_cast<uint64_t>(run.seed), static_cast<uint64_t>(step),
                        static_cast<uint64_t>(sequence));
}

Table Recipe::to_table() const {
  Table root;
  root.set("model", {field_table(model), {}});
  root.set("data", {field_table(data), {}});
  root.set("schedule", {field_table(schedule), {}});
  root.set("training", {field_table(training), {}});
  root.set("run", {field_table(run), {}});
  return root;
}

Recipe read_recipe(const Table& root, const std::string& recipe_file) {
  expect_sections(root, {"model", "data", "schedule", "training", "run"});
  Recipe recipe;
  recipe.model = model::ModelConfig::read(section(root, "model"), "model");
  read_fields(recipe.data, section(root, "data"), "data");
  read_fields(recipe.schedule, section(root, "schedule"), "schedule");
  read_fields(recipe.training, with_one_duration(section(root, "training"), recipe_file), "training");
  read_fields(recipe.run, section(root, "run"), "run");

  validate_data(recipe);
  validate_schedule(recipe);
  validate_training(recipe);
  expect(!recipe.run.directory.empty(), "run.directory = \"\": expected a directory");
  resolve_duration(recipe.training);
  if (recipe.training.micro_batch == 0)
    recipe.training.micro_batch = kMicroBatchTokens / recipe.data.sequence_length;
  recipe.training.micro_batch = std::clamp<int64_t>(recipe.training.micro_batch, 1, recipe.batch_sequences());
  return recipe;
}

namespace {

std::optional<RecipeDifference> difference(const Table& stored, const Table& wanted,
                                           const std::set<std::string_view>& harmless) {
  const Table before = flatten(stored), now = flatten(wanted);
  const bool same_duration = total_steps(before) == total_steps(now);
  const auto text = [](const Table& table, const std::string& key) {
    const Value* value = table.find(key);
    return value == nullptr ? std::string("absent") : formats::to_json(*value);
  };
  for (const Table* keys : {&now, &before}) {
    for (const Entry& entry : keys->entries) {
      const bool duration = entry.key == "training.steps" || entry.key == "training.tokens";
      if (harmless.contains(entry.key) || (duration && same_duration)) continue;
      const std::string a = text(before, entry.key), b = text(now, entry.key);
      if (a != b) return RecipeDifference{entry.key, a, b};
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<RecipeDifference> first_difference(const Table& stored, const Table& wanted) {
  return difference(stored, wanted, kHarmlessKeys);
}

std::optional<RecipeDifference> first_difference_between_ranks(const Table& theirs, const Table& ours) {
  return difference(theirs, ours, {"run.directory"});
}

}  // namespace oryx::training
