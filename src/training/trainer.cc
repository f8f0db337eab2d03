#include "training/trainer.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <fmt/ranges.h>

#include <chrono>
#include <cmath>
#include <utility>

#include "base/device_copy.h"
#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "model/language_model.h"
#include "model/weights.h"
#include "training/checkpoint.h"
#include "training/data.h"
#include "training/gradient_exchange.h"
#include "training/metrics.h"
#include "training/optimizer.h"
#include "training/sharding.h"
#include "training/start.h"
#include "training/validation.h"

namespace oryx::training {

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

class Trainer {
 public:
  Trainer(const Recipe& recipe, c10::Device device, const std::atomic<bool>& stop, ProcessGroup* group)
      : group_(group),
        source_(recipe.data.train, recipe.data.sequence_length, recipe.model.vocabulary, "data.train"),
        recipe_(for_data(recipe, source_)),
        identity_(source_.identity()),
        tokenizer_file_(source_.tokenizer_file()),
        validation_(Validation::create(recipe_, source_.tokenizer())),
        share_(agreed_share(recipe_, identity_, validation_, group_)),
        run_(leads() ? std::make_unique<RunDirectory>(recipe_.run.directory) : nullptr),
        checkpoint_(run_ ? run_->latest() : std::nullopt),
        step_(shared("step", checkpoint_ ? matching_state(*checkpoint_, recipe_, identity_).step : 0)),
        model_(recipe_.model, make_weights(device), recipe_.compute_dtype()),
        exchange_(make_exchange()),
        optimizer_(make_optimizer()),
        rate_{recipe_.training.learning_rate, recipe_.training.minimum_learning_rate,
              recipe_.training.warmup_fraction, recipe_.steps()},
        metrics_(run_ ? std::make_unique<Metrics>(run_->path(), checkpoint_ ? step_ : -1) : nullptr),
        stop_(stop) {
    model_.set_recompute_layers(recipe_.training.recompute == "layers");
    restore_moments(checkpoint_, shards(), optimizer_, model_.weights(), exchange_.get(), group_);
    const bool validated = metrics_ && metrics_->last_validation();
    validated_step_ = shared("validated step", validated ? metrics_->last_validation()->step : -1);
    if (metrics_ && metrics_->last_train()) seconds_before_ = metrics_->last_train()->seconds;
  }

  Outcome run();

 private:
  bool leads() const { return group_ == nullptr || group_->leads(); }
  bool shards() const { return group_ != nullptr && recipe_.training.shard_optimizer; }
  int64_t tokens() const { return step_ * recipe_.training.batch_tokens; }
  bool is_last() const { return step_ == recipe_.steps(); }
  bool due(int64_t every) const { return is_last() || (every > 0 && step_ % every == 0); }
  // Ranks must decide alike: what one of them was asked counts once all have heard of it.
  bool stops() const { return group_ ? all_stop_ : stop_.load(); }
  // Rank 0's number.
  int64_t shared(const std::string& key, int64_t number) const {
    return group_ ? std::stoll(group_->share(key, std::to_string(number))) : number;
  }
  std::vector<Bucket> make_buckets() const;
  model::Weights make_weights(c10::Device device);
  std::unique_ptr<GradientExchange> make_exchange();
  Optimizer make_optimizer();

  void describe() const;
  TrainMetrics train_step(const at::Tensor& batch);
  // The mean loss of the batch (float64, on the device), whose gradient is added to the weights' own. With a
  // group the loss is this rank's part of it, the gradients are the sums over all ranks.
  at::Tensor accumulate_gradients(const at::Tensor& batch, int64_t* attention_tokens);
  // Returns the norm of the gradients, which are gone then.
  at::Tensor update(double learning_rate);
  void sum_over_ranks(at::Tensor* loss, int64_t* attention_tokens);
  void expect_finite(std::string_view what, double value) const;
  std::string last_good_checkpoint() const;
  // False when it was cut short by a request to stop.
  bool validate_if_due();
  void save();

  ProcessGroup* const group_;  // null: a rank on its own
  const SequenceSource source_;
  const Recipe recipe_;
  const DataIdentity identity_;
  const fs::path tokenizer_file_;
  const std::optional<Validation> validation_;
  const Share share_;                        // of the sequences of every batch
  const std::unique_ptr<RunDirectory> run_;  // of rank 0, as the metrics and the checkpoint
  std::optional<fs::path> checkpoint_;
  int64_t step_;                     // updates made
  std::vector<at::Tensor> masters_;  // from make_weights() to the optimizer, where each rank has its part
  model::LanguageModel model_;
  const std::unique_ptr<GradientExchange> exchange_;  // with a group
  Optimizer optimizer_;
  const LearningRate rate_;
  const std::unique_ptr<Metrics> metrics_;
  const std::atomic<bool>& stop_;
  bool all_stop_ = false;
  int64_t validated_step_ = -1;  // updates made when the newest validation ran
  double seconds_before_ = 0;    // of earlier runs
  const Clock::time_point begin_ = Clock::now();
};

std::vector<Bucket> Trainer::make_buckets() const {
  return training::make_buckets(model::parameter_specs(recipe_.model), bucket_limit(recipe_.weight_dtype()),
                                group_->size());
}

model::Weights Trainer::make_weights(c10::Device device) {
  model::Weights weights = starting_weights(recipe_, checkpoint_, device, group_);
  if (!shards()) return weights;
  const std::vector<Piece> pieces = pieces_of(make_buckets(), group_->rank(), group_->size());
  masters_ = take_masters(weights, model::parameter_specs(recipe_.model), recipe_.compute_dtype(), pieces);
  return weights;
}

std::unique_ptr<GradientExchange> Trainer::make_exchange() {
  if (!group_) return nullptr;
  std::vector<at::Tensor> parameters;
  for (const auto& [name, tensor] : model_.weights().entries()) parameters.push_back(tensor);
  return std::make_unique<GradientExchange>(std::move(parameters), make_buckets(), *group_, shards());
}

Optimizer Trainer::make_optimizer() {
  const TrainingOptions& t = recipe_.training;
  const AdamwRates rates{t.beta1, t.beta2, t.weight_decay};
  if (!shards()) return Optimizer(model_.weights(), rates);
  return Optimizer(model_.weights(), rates, exchange_->pieces(), std::exchange(masters_, {}));
}

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
  if (group_) {
    log("ranks     {}, each {} or {} of the {} sequences of a step; the optimizer's state {}", group_->size(),
        recipe_.batch_sequences() / group_->size(),
        (recipe_.batch_sequences() + group_->size() - 1) / group_->size(), recipe_.batch_sequences(),
        shards() ? "in parts" : "on each");
  }
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
  if (!checkpoint_) return log("run       {}", run_->path().string());
  log("run       {}, {} {} of {} steps", run_->path().string(),
      is_last() ? "which is finished: it made" : "which goes on after", step_, recipe_.steps());
}

Outcome Trainer::run() {
  if (leads()) describe();
  const int64_t first_step = step_;
  BatchLoader loader(source_, recipe_.batch_sequences(), share_, recipe_.data.order == "shuffled",
                     static_cast<uint64_t>(recipe_.run.seed), step_, recipe_.steps());
  std::optional<ProgressBar> bar;
  if (leads()) {
    bar.emplace(recipe_.steps() * recipe_.training.batch_tokens, "training",
                ProgressOptions{"tok", tokens()});
  }
  bool complete = validate_if_due();
  while (complete && !is_last()) {
    const TrainMetrics metrics = train_step(loader.next());
    if (bar) {
      bar->set(tokens());
      bar->note(fmt::format("loss {:.3f}", metrics.loss));
    }
    complete = validate_if_due();
    if (due(recipe_.training.checkpoint_every) || stops()) save();
    complete = complete && (!stops() || is_last());
  }
  Outcome outcome;
  outcome.steps = step_;
  outcome.tokens = tokens();
  outcome.already_finished = first_step == recipe_.steps();
  outcome.interrupted = !complete;
  if (metrics_ && metrics_->last_train()) outcome.loss = metrics_->last_train()->loss;
  if (metrics_ && metrics_->last_validation()) outcome.validation_loss = metrics_->last_validation()->loss;
  if (checkpoint_) outcome.model = *checkpoint_;
  return outcome;
}

TrainMetrics Trainer::train_step(const at::Tensor& batch) {
  const Clock::time_point begin = Clock::now();
  TrainMetrics metrics;
  int64_t attention_tokens = 0;
  metrics.learning_rate = rate_.at(step_);
  at::Tensor loss = accumulate_gradients(batch, &attention_tokens);
  const at::Tensor norm = update(metrics.learning_rate);
  if (group_) sum_over_ranks(&loss, &attention_tokens);
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
  if (metrics_) metrics_->record(metrics);
  return metrics;
}

at::Tensor Trainer::update(double learning_rate) {
  const double clip = recipe_.training.clip;
  if (!shards()) {
    const at::Tensor norm = optimizer_.clip_and_update(step_, learning_rate, clip);
    optimizer_.clear_gradients();
    return norm;
  }
  const at::Tensor norm =
      optimizer_.clip_and_update(step_, learning_rate, clip, exchange_->gradients(), *group_);
  exchange_->clear();
  share_weights(model_.weights(), optimizer_, exchange_->buckets(), *group_);
  return norm;
}

// The last exchange of a step, for which the host waits: once it is there, all others are.
void Trainer::sum_over_ranks(at::Tensor* loss, int64_t* attention_tokens) {
  const at::Tensor counts =
      at::tensor({static_cast<double>(*attention_tokens), stop_ ? 1.0 : 0.0}, at::kDouble);
  const at::Tensor sums = at::cat({loss->view({1}), copy_to(counts, model_.device())});
  group_->all_reduce(sums).finish();
  const at::Tensor on_host = sums.cpu();
  *loss = on_host.select(0, 0);
  *attention_tokens = static_cast<int64_t>(on_host.const_data_ptr<double>()[1]);
  all_stop_ = on_host.const_data_ptr<double>()[2] > 0;
}

at::Tensor Trainer::accumulate_gradients(const at::Tensor& batch, int64_t* attention_tokens) {
  const int64_t sequences = batch.size(0), length = source_.length(), all = recipe_.batch_sequences();
  const double scale = 1.0 / static_cast<double>(all * length);
  at::Tensor loss = at::zeros({}, at::TensorOptions(model_.device()).dtype(at::kDouble));
  const at::Tensor all_tokens = copy_to(batch, model_.device());
  for (int64_t begin = 0; begin < sequences; begin += recipe_.training.micro_batch) {
    const int64_t size = std::min(recipe_.training.micro_batch, sequences - begin);
    std::vector<schedule::ModeSpans> spans;
    for (int64_t i = begin; i < begin + size; ++i) {
      spans.push_back(recipe_.training_spans(step_, step_ * all + share_.begin + i));
      *attention_tokens += schedule::attention_tokens(spans.back());
    }
    const at::Tensor tokens = all_tokens.narrow(0, begin, size);
    const at::Tensor targets = tokens.narrow(1, 1, length).reshape({size * length});
    const at::Tensor hidden = model_.hidden(tokens.narrow(1, 0, length), spans);
    const at::Tensor part = model_.loss(hidden, targets, scale).first;
    loss.add_(part.detach());
    if (exchange_ && begin + size == sequences) exchange_->expect_last_pass();
    part.backward();
  }
  if (exchange_) exchange_->finish();
  return loss;
}

void Trainer::expect_finite(std::string_view what, double value) const {
  if (std::isfinite(value)) return;
  fail("step {}: the {} is {}: stopped, and nothing of this step is kept; {}", step_ + 1, what, value,
       last_good_checkpoint());
}

std::string Trainer::last_good_checkpoint() const {
  if (!leads()) return "rank 0 names the last good checkpoint";
  return checkpoint_ ? "the last good checkpoint is " + checkpoint_->string()
                     : "no checkpoint was written yet";
}

bool Trainer::validate_if_due() {
  if (!validation_ || !(step_ == 0 || due(recipe_.training.validation_every))) return true;
  if (validated_step_ == step_) return true;
  ValidationMetrics metrics;
  metrics.step = step_;
  metrics.tokens = tokens();
  metrics.loss = validation_->losses(model_, stop_, group_);
  if (metrics.loss.empty()) {
    all_stop_ = true;
    return false;
  }
  std::string text;
  for (const auto& [mode, loss] : metrics.loss) {
    if (!std::isfinite(loss)) {
      fail("step {}: the validation loss in {} mode is {}; {}", step_, mode, loss, last_good_checkpoint());
    }
    text += fmt::format("  {} {:.4f}", mode, loss);
  }
  validated_step_ = step_;
  if (!leads()) return true;
  metrics_->record(metrics);
  log("step {:>6}  validation loss{}", step_, text);
  return true;
}

void Trainer::save() {
  const model::Weights weights =
      shards() ? gather_masters(optimizer_, model_.weights(), exchange_->buckets(), *group_)
               : model_.weights();
  const formats::NamedTensors moments =
      shards() ? gather_moments(optimizer_, model_.weights(), exchange_->buckets(), *group_)
               : optimizer_.moments();
  if (!leads()) return;
  metrics_->flush();
  TrainingState state;
  state.step = step_;
  state.data_position = step_ * recipe_.batch_sequences();
  state.data = identity_;
  state.recipe = recipe_.to_table();
  run_->save(state, recipe_.model, weights, moments, tokenizer_file_, recipe_.training.checkpoints_to_keep);
  checkpoint_ = run_->latest();
}

}  // namespace

Outcome train(const Recipe& recipe, c10::Device device, const std::atomic<bool>& stop, ProcessGroup* group) {
  const c10::DeviceGuard guard(device);
  return Trainer(recipe, device, stop, group).run();
}

}  // namespace oryx::training
