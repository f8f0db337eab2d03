#include "training/trainer.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <chrono>
#include <cmath>

#include "base/device_copy.h"
#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "model/language_model.h"
#include "model/weights.h"
#include "training/checkpoint.h"
#include "training/data.h"
#include "training/metrics.h"
#include "training/optimizer.h"
#include "training/validation.h"

namespace oryx::training {

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// The recipe with what only the data says: which tokenizer the model goes with.
Recipe for_data(Recipe recipe, const SequenceSource& data) {
  recipe.model.tokenizer = data.tokenizer() == "bytes" ? "bytes" : "tokenizer.json";
  return recipe;
}

model::Weights starting_weights(const Recipe& recipe, const std::optional<fs::path>& checkpoint) {
  if (checkpoint) return model::load_weights(*checkpoint, recipe.model, recipe.weight_dtype());
  const std::string& initial = recipe.training.initial_model;
  if (!initial.empty()) return model::load_weights(initial, recipe.model, recipe.weight_dtype());
  return model::initial_weights(recipe.model, static_cast<uint64_t>(recipe.run.seed), recipe.weight_dtype());
}

model::Weights to_device(model::Weights weights, c10::Device device) {
  for (auto& [name, tensor] : weights.entries()) tensor = tensor.to(device);
  return weights;
}

// The state of the run in `checkpoint`, which must be one of this recipe and this data.
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

class Trainer {
 public:
  Trainer(const Recipe& recipe, c10::Device device, const std::atomic<bool>& stop)
      : source_(recipe.data.train, recipe.data.sequence_length, recipe.model.vocabulary, "data.train"),
        recipe_(for_data(recipe, source_)),
        identity_(source_.identity()),
        tokenizer_file_(source_.tokenizer_file()),
        validation_(Validation::create(recipe_, source_.tokenizer())),
        run_(recipe_.run.directory),
        checkpoint_(run_.latest()),
        step_(checkpoint_ ? matching_state(*checkpoint_, recipe_, identity_).step : 0),
        model_(recipe_.model, to_device(starting_weights(recipe_, checkpoint_), device),
               recipe_.compute_dtype()),
        optimizer_(model_.weights(),
                   {recipe_.training.beta1, recipe_.training.beta2, recipe_.training.weight_decay}),
        rate_{recipe_.training.learning_rate, recipe_.training.minimum_learning_rate,
              recipe_.training.warmup_fraction, recipe_.steps()},
        metrics_(run_.path(), checkpoint_ ? step_ : -1),
        stop_(stop) {
    model_.set_recompute_layers(recipe_.training.recompute == "layers");
    if (checkpoint_) load_moments(*checkpoint_, optimizer_);
    if (metrics_.last_train()) seconds_before_ = metrics_.last_train()->seconds;
  }

  Outcome run();

 private:
  int64_t tokens() const { return step_ * recipe_.training.batch_tokens; }
  bool is_last() const { return step_ == recipe_.steps(); }
  bool due(int64_t every) const { return is_last() || (every > 0 && step_ % every == 0); }

  void describe() const;
  TrainMetrics train_step(const at::Tensor& batch);
  // The mean loss of the batch (float64, on the device), whose gradient is added to the weights' own.
  at::Tensor accumulate_gradients(const at::Tensor& batch, int64_t* attention_tokens);
  void expect_finite(std::string_view what, double value) const;
  // False when it was cut short by a request to stop.
  bool validate_if_due();
  void save();

  const SequenceSource source_;
  const Recipe recipe_;
  const DataIdentity identity_;
  const fs::path tokenizer_file_;
  const std::optional<Validation> validation_;
  const RunDirectory run_;
  std::optional<fs::path> checkpoint_;
  int64_t step_;  // updates made
  model::LanguageModel model_;
  Optimizer optimizer_;
  const LearningRate rate_;
  Metrics metrics_;
  const std::atomic<bool>& stop_;
  double seconds_before_ = 0;  // of earlier runs
  const Clock::time_point begin_ = Clock::now();
};

void Trainer::describe() const {
  int64_t parameters = 0;
  for (const model::ParameterSpec& spec : model::parameter_specs(recipe_.model)) parameters += spec.size();
  const ScheduleOptions& schedule = recipe_.schedule;
  std::string modes = "one mode";
  if (!schedule.fixed.empty()) {
    modes = schedule.fixed;
  } else if (recipe_.model.is_switchable()) {
    modes = fmt::format("attention with probability {} per {}", schedule.attention_probability,
                        schedule.per == "chunk" ? fmt::format("chunk of {}", schedule.chunk) : "sequence");
  }
  const TrainingOptions& t = recipe_.training;
  log("model     {}: {} layers, width {}, {:.2f} million parameters, computing in {} on {}",
      fmt::join(recipe_.model.mixers, " + "), recipe_.model.layers, recipe_.model.width,
      1e-6 * static_cast<double>(parameters), t.dtype, model_.device().str());
  log("data      {} tokens, {} sequences of {}, {}", source_.tokens(), source_.count(), source_.length(),
      recipe_.data.order);
  log("schedule  {}", modes);
  log("training  {} steps of {} tokens: {} tokens, {:.2f} passes; peak learning rate {}", recipe_.steps(),
      t.batch_tokens, recipe_.steps() * t.batch_tokens,
      static_cast<double>(recipe_.steps() * recipe_.batch_sequences()) / static_cast<double>(source_.count()),
      t.learning_rate);
  if (!checkpoint_) return log("run       {}", run_.path().string());
  log("run       {}, {} {} of {} steps", run_.path().string(),
      is_last() ? "which is finished: it made" : "which goes on after", step_, recipe_.steps());
}

Outcome Trainer::run() {
  describe();
  const int64_t first_step = step_;
  BatchLoader loader(source_, recipe_.batch_sequences(), recipe_.data.order == "shuffled",
                     static_cast<uint64_t>(recipe_.run.seed), step_, recipe_.steps());
  ProgressBar bar(recipe_.steps() * recipe_.training.batch_tokens, "training", {"tok", tokens()});
  bool complete = validate_if_due();
  while (complete && !is_last()) {
    const TrainMetrics metrics = train_step(loader.next());
    bar.set(tokens());
    bar.note(fmt::format("loss {:.3f}", metrics.loss));
    complete = validate_if_due();
    if (due(recipe_.training.checkpoint_every) || stop_) save();
    complete = complete && (!stop_ || is_last());
  }
  Outcome outcome;
  outcome.steps = step_;
  outcome.tokens = tokens();
  outcome.already_finished = first_step == recipe_.steps();
  outcome.interrupted = !complete;
  if (metrics_.last_train()) outcome.loss = metrics_.last_train()->loss;
  if (metrics_.last_validation()) outcome.validation_loss = metrics_.last_validation()->loss;
  if (checkpoint_) outcome.model = *checkpoint_;
  return outcome;
}

TrainMetrics Trainer::train_step(const at::Tensor& batch) {
  const Clock::time_point begin = Clock::now();
  TrainMetrics metrics;
  int64_t attention_tokens = 0;
  metrics.learning_rate = rate_.at(step_);
  const at::Tensor loss = accumulate_gradients(batch, &attention_tokens);
  const at::Tensor norm = optimizer_.clip_and_update(step_, metrics.learning_rate, recipe_.training.clip);
  optimizer_.clear_gradients();
  // The first look at a number of this step: a GPU has the whole step in its queue by now.
  metrics.loss = loss.item<double>();
  metrics.gradient_norm = norm.item<double>();
  expect_finite("loss", metrics.loss);
  expect_finite("gradient norm", metrics.gradient_norm);
  ++step_;
  metrics.step = step_;
  metrics.tokens = tokens();
  metrics.attention_share =
      static_cast<double>(attention_tokens) / static_cast<double>(recipe_.training.batch_tokens);
  metrics.tokens_per_second = static_cast<double>(recipe_.training.batch_tokens) / seconds_since(begin);
  metrics.seconds = seconds_before_ + seconds_since(begin_);
  metrics_.record(metrics);
  return metrics;
}

at::Tensor Trainer::accumulate_gradients(const at::Tensor& batch, int64_t* attention_tokens) {
  const int64_t sequences = batch.size(0), length = source_.length();
  const double scale = 1.0 / static_cast<double>(sequences * length);
  at::Tensor loss = at::zeros({}, at::TensorOptions(model_.device()).dtype(at::kDouble));
  const at::Tensor all_tokens = copy_to(batch, model_.device());
  for (int64_t begin = 0; begin < sequences; begin += recipe_.training.micro_batch) {
    const int64_t size = std::min(recipe_.training.micro_batch, sequences - begin);
    std::vector<schedule::ModeSpans> spans;
    for (int64_t i = begin; i < begin + size; ++i) {
      spans.push_back(recipe_.training_spans(step_, step_ * sequences + i));
      *attention_tokens += schedule::attention_tokens(spans.back());
    }
    const at::Tensor tokens = all_tokens.narrow(0, begin, size);
    const at::Tensor targets = tokens.narrow(1, 1, length).reshape({size * length});
    const at::Tensor hidden = model_.hidden(tokens.narrow(1, 0, length), spans);
    const at::Tensor part = model_.loss(hidden, targets, scale).first;
    loss.add_(part.detach());
    part.backward();
  }
  return loss;
}

void Trainer::expect_finite(std::string_view what, double value) const {
  if (std::isfinite(value)) return;
  fail(
      "step {}: the {} is {}: stopped, and nothing of this step is kept; {}", step_ + 1, what, value,
      checkpoint_ ? "the last good checkpoint is " + checkpoint_->string() : "no checkpoint was written yet");
}

bool Trainer::validate_if_due() {
  if (!validation_ || !(step_ == 0 || due(recipe_.training.validation_every))) return true;
  if (metrics_.last_validation() && metrics_.last_validation()->step == step_) return true;
  ValidationMetrics metrics;
  metrics.step = step_;
  metrics.tokens = tokens();
  metrics.loss = validation_->losses(model_, stop_);
  if (metrics.loss.empty()) return false;
  std::string text;
  for (const auto& [mode, loss] : metrics.loss) {
    if (!std::isfinite(loss)) {
      fail("step {}: the validation loss in {} mode is {}; {}", step_, mode, loss,
           checkpoint_ ? "the last good checkpoint is " + checkpoint_->string()
                       : "no checkpoint was written yet");
    }
    text += fmt::format("  {} {:.4f}", mode, loss);
  }
  metrics_.record(metrics);
  log("step {:>6}  validation loss{}", step_, text);
  return true;
}

void Trainer::save() {
  metrics_.flush();
  TrainingState state;
  state.step = step_;
  state.data_position = step_ * recipe_.batch_sequences();
  state.data = identity_;
  state.recipe = recipe_.to_table();
  run_.save(state, recipe_.model, model_.weights(), optimizer_, tokenizer_file_,
            recipe_.training.checkpoints_to_keep);
  checkpoint_ = run_.latest();
}

}  // namespace

Outcome train(const Recipe& recipe, c10::Device device, const std::atomic<bool>& stop) {
  return Trainer(recipe, device, stop).run();
}

}  // namespace oryx::training
