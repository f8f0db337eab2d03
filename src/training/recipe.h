// A training run as data: the sections of a recipe file, each with its defaults.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/value.h"
#include "model/config.h"
#include "schedule/spans.h"

namespace oryx::training {

struct DataOptions {
  std::vector<std::string> train;       // shard directories, read one after the other
  std::vector<std::string> validation;  // none: no validation
  int64_t sequence_length = 2048;
  std::string order = "shuffled";

  template <class Visitor>
  void visit_fields(Visitor& visitor) {
    visitor.required("train", train, "shard directories");
    visitor("validation", validation, "shard directories; empty for no validation");
    visitor("sequence_length", sequence_length, "tokens of a sequence");
    visitor.choice("order", order, {"shuffled", "sequential"}, "a fresh permutation each pass, or in turn");
  }
};

// How training assigns modes to tokens. Models that cannot switch have one mode for every token, whatever
// stands here, but an explicit `fixed` must not ask for another.
struct ScheduleOptions {
  double attention_probability = 0.25;
  int64_t chunk = 128;
  std::string per = "chunk";
  std::string fixed;  // empty: draw

  template <class Visitor>
  void visit_fields(Visitor& visitor) {
    visitor("attention_probability", attention_probability, "chance of a chunk to be attention");
    visitor("chunk", chunk, "tokens that share one draw");
    visitor.choice("per", per, {"chunk", "sequence"}, "what is drawn at once");
    visitor("fixed", fixed, "a schedule for all sequences, instead of draws");
  }
};

struct TrainingOptions {
  int64_t tokens = 0;  // one of these two is 0
  int64_t steps = 0;
  int64_t batch_tokens = 524'288;
  int64_t micro_batch = 0;  // sequences; resolved by read_recipe to about 8192 tokens
  double learning_rate = 3e-3;
  double minimum_learning_rate = 1e-5;
  double warmup_fraction = 0.1;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double weight_decay = 0.1;
  double clip = 1.0;
  std::string dtype = "float32";
  std::string recompute = "none";
  std::string initial_model;
  int64_t validation_every = 100;
  int64_t validation_sequences = 64;
  bool validation_mixed = false;
  int64_t checkpoint_every = 100;
  int64_t checkpoints_to_keep = 2;
  bool shard_optimizer = false;
  int64_t timeout_seconds = 600;

  template <class Visitor>
  void visit_fields(Visitor& visitor) {
    visitor("tokens", tokens, "tokens to train on, rounded down to whole steps (default: 100 billion)");
    visitor("steps", steps, "optimizer steps; give this or tokens");
    visitor("batch_tokens", batch_tokens, "tokens of one step, a multiple of sequence_length");
    visitor("micro_batch", micro_batch, "sequences in one forward pass (default: about 8192 tokens)");
    visitor("learning_rate", learning_rate, "peak, reached after the warm-up");
    visitor("minimum_learning_rate", minimum_learning_rate, "where the cosine ends");
    visitor("warmup_fraction", warmup_fraction, "fraction of the steps");
    visitor("beta1", beta1, "AdamW's decay of the mean gradient");
    visitor("beta2", beta2, "AdamW's decay of the mean squared gradient");
    visitor("weight_decay", weight_decay, "of tensors with two dimensions and more");
    visitor("clip", clip, "limit of the gradient's global norm; 0 for none");
    visitor.choice("dtype", dtype, {"float32", "bfloat16", "float64"},
                   "computing type; bfloat16 keeps float32 weights");
    visitor.choice("recompute", recompute, {"none", "layers"},
                   "layers: keep only their inputs for backward and run them again there");
    visitor("initial_model", initial_model, "a model directory to start from; empty: random weights");
    visitor("validation_every", validation_every, "steps; 0 for only at the start and the end");
    visitor("validation_sequences", validation_sequences,
            "sequences of a validation, spread evenly; 0 for all");
    visitor("validation_mixed", validation_mixed, "also validate under schedules drawn as in training");
    visitor("checkpoint_every", checkpoint_every, "steps; 0 for only at the end");
    visitor("checkpoints_to_keep", checkpoints_to_keep, "the newest ones");
    visitor("shard_optimizer", shard_optimizer,
            "with several ranks: each holds a part of the moments and of float32 originals");
    visitor("timeout_seconds", timeout_seconds, "with several ranks: how long one waits for the others");
  }
};

struct RunOptions {
  std::string directory;
  int64_t seed = 0;
  std::string device = "auto";

  template <class Visitor>
  void visit_fields(Visitor& visitor) {
    visitor.required("directory", directory, "where checkpoints and metrics go");
    visitor("seed", seed, "of the initial weights, the order of the data and the schedules");
    visitor.choice("device", device, {"auto", "cpu", "cuda"}, "where to compute");
  }
};

struct Recipe {
  model::ModelConfig model;
  DataOptions data;
  ScheduleOptions schedule;
  TrainingOptions training;
  RunOptions run;

  int64_t batch_sequences() const { return training.batch_tokens / data.sequence_length; }
  int64_t steps() const {
    return training.steps > 0 ? training.steps : training.tokens / training.batch_tokens;
  }
  at::ScalarType compute_dtype() const;
  at::ScalarType weight_dtype() const;  // float64 for float64, else float32

  // The modes of a training sequence: `sequence` is its place in the data order, counted over all passes.
  schedule::ModeSpans training_spans(int64_t step, int64_t sequence) const;

  // All sections with every key, as training.json stores them and as a recipe file would say it.
  Table to_table() const;
};

// The tree of a recipe file (formats::read_recipe and apply_overrides) as a recipe whose every value is
// resolved and checked. `recipe_file` is the file given by the user: of tokens and steps, the one said by the
// later layer (base, recipe, command line) counts. Throws Error naming section, key, value and what was
// expected. Data and initial weights are not looked at here.
Recipe read_recipe(const Table& root, const std::string& recipe_file);

// A key whose values in two recipes differ so that they describe different runs, with both values as text.
// Keys that leave the weights of every step as they are (device, directories, how often and on what to
// validate, when to save, what each rank holds) never count; whether moved training data is the same data is
// up to the caller.
struct RecipeDifference {
  std::string key, stored, wanted;
};
std::optional<RecipeDifference> first_difference(const Table& stored, const Table& wanted);

// The same for two ranks of one run, which must agree in every key but the place of the run directory.
std::optional<RecipeDifference> first_difference_between_ranks(const Table& theirs, const Table& ours);

}  // namespace oryx::training
