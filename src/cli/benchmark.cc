// oryx benchmark: tokens a second of a training step, a prefill, and decoding, on random weights and tokens;
// and operators beside their floors.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <optional>

#include "base/error.h"
#include "cli/benchmark_operators.h"
#include "cli/commands.h"
#include "cli/measure.h"
#include "cli/model_source.h"
#include "cli/options.h"
#include "cli/ranks.h"
#include "formats/json.h"
#include "model/language_model.h"
#include "operators/activations.h"
#include "schedule/schedule.h"
#include "schedule/training_draw.h"
#include "training/buckets.h"
#include "training/gradient_exchange.h"
#include "training/optimizer.h"
#include "training/sharding.h"

namespace oryx::cli {

namespace {

using schedule::Mode;
using schedule::ModeSpans;

struct Options {
  std::string source;
  std::vector<std::string> overrides;
  ComputeOptions compute;
  std::string schedule;
  std::string filter;
  int64_t batch = 8, length = 2048, context = 2048, tokens = 32, repeats = 5, heads = 16, head_dim = 128,
          prompts = 1, scored = 0;
  bool all_logits = false, json = false, profile = false, recompute = false, shard = false;
};

struct Timing {
  std::string what;
  std::string schedule;
  int64_t tokens_per_repeat = 0;
  std::vector<double> seconds;   // one a repeat
  double model_flops_share = 0;  // of the device's rate of matrix products; 0 where not measured
  struct Exchange {
    int64_t ranks = 1;
    // Medians of what a step waits for sums after its backward pass, and of the step: as training has it, and
    // with nothing sent before that pass has ended.
    double wait = 0, wait_begun_after = 0, step = 0, step_begun_after = 0;
  };
  std::optional<Exchange> exchange = {};  // with several ranks
};

// The parts of a training step, by what the names of their kernels (and of the kernels' arguments) contain;
// the first that matches counts.
struct Part {
  const char* name;
  std::vector<const char*> patterns;
};
const std::array parts = {
    Part{"ssd", {"Ssd"}},
    Part{"gated delta rule", {"GatedDelta", "ChunkArguments"}},
    Part{"attention", {"Attention", "HeadSlice", "sdpa", "fmha", "flash"}},
    Part{"short convolution", {"Conv"}},
    Part{"decays", {"DecayTensors"}},
    Part{"norms and gates", {"Norm"}},
    Part{"queries and keys", {"HeadTensors"}},
    Part{"loss", {"RowLosses", "Upstream"}},
    Part{"optimizer", {"Adamw", "Squares"}},
    Part{"rows", {"add_kernel", "RowMerge"}},
    Part{"matrix products", {"gemm", "nvjet", "cutlass", "xmma", "cublas", "splitK"}},
    Part{"copies and fills", {"Memcpy", "Memset", "copy_kernel", "FillFunctor"}},
    Part{"sums of gradients", {"CUDAFunctor_add"}},
    Part{"other", {""}},
};

std::vector<KernelTime> by_part(const std::vector<KernelTime>& kernels) {
  std::vector<KernelTime> times;
  for (const Part& part : parts) times.push_back({part.name, 0, 0});
  for (const KernelTime& kernel : kernels) {
    for (size_t i = 0; i < parts.size(); ++i) {
      if (std::none_of(parts[i].patterns.begin(), parts[i].patterns.end(),
                       [&](const char* pattern) { return kernel.name.find(pattern) != std::string::npos; }))
        continue;
      times[i].seconds += kernel.seconds;
      times[i].calls += kernel.calls;
      break;
    }
  }
  std::erase_if(times, [](const KernelTime& time) { return time.calls == 0; });
  return times;
}

void print_profile(const std::vector<KernelTime>& kernels) {
  double total = 0;
  for (const KernelTime& kernel : kernels) total += kernel.seconds;
  fmt::print("{:<28} {:>9} {:>7} {:>7}\n", "part of a step", "ms", "share", "calls");
  for (const KernelTime& part : by_part(kernels)) {
    fmt::print("{:<28} {:>9.3f} {:>6.1f}% {:>7}\n", part.name, 1e3 * part.seconds, 100 * part.seconds / total,
               part.calls);
  }
  fmt::print("{:<28} {:>9.3f}\n\nlongest kernels\n", "all kernels", 1e3 * total);
  for (size_t i = 0; i < std::min<size_t>(kernels.size(), 40); ++i) {
    fmt::print("{:>9.3f} ms {:>6} calls  {:.150}\n", 1e3 * kernels[i].seconds, kernels[i].calls,
               kernels[i].name);
  }
}

void report(const Options& options, Timing timing) {
  std::sort(timing.seconds.begin(), timing.seconds.end());
  const double tokens = static_cast<double>(timing.tokens_per_repeat);
  const double best = tokens / timing.seconds.front(),
               median = tokens / timing.seconds[timing.seconds.size() / 2];
  if (options.json) {
    Table table;
    table.set("benchmark", Value{timing.what});
    table.set("source", Value{options.source});
    table.set("schedule", Value{timing.schedule});
    table.set("dtype", Value{options.compute.dtype});
    table.set("threads", Value{static_cast<int64_t>(at::get_num_threads())});
    table.set("tokens_per_second", Value{best});
    table.set("median_tokens_per_second", Value{median});
    if (timing.model_flops_share > 0) table.set("model_flops_share", Value{timing.model_flops_share});
    if (const auto& exchange = timing.exchange) {
      table.set("ranks", Value{exchange->ranks});
      table.set("step_seconds", Value{exchange->step});
      table.set("exchange_wait_seconds", Value{exchange->wait});
      table.set("step_seconds_begun_after", Value{exchange->step_begun_after});
      table.set("exchange_wait_seconds_begun_after", Value{exchange->wait_begun_after});
    }
    table.set("peak_memory_bytes", Value{peak_memory(options.compute.resolve_device())});
    fmt::print("{}\n", formats::to_json(table));
  } else {
    fmt::print("{} {} {} {}: {:.1f} tok/s best, {:.1f} median of {}, peak memory {:.2f} GiB\n", timing.what,
               options.source, options.compute.dtype, timing.schedule, best, median, timing.seconds.size(),
               static_cast<double>(peak_memory(options.compute.resolve_device())) / (1 << 30));
    if (timing.model_flops_share > 0) {
      fmt::print("products with weights: {:.1f} % of the measured rate of matrix products\n",
                 100 * timing.model_flops_share);
    }
    if (const auto& exchange = timing.exchange) {
      fmt::print(
          "exchange over {} ranks: {:.2f} ms of a step of {:.2f} ms not hidden by backward; begun after it "
          "{:.2f} ms of {:.2f} ms\n",
          exchange->ranks, 1e3 * exchange->wait, 1e3 * exchange->step, 1e3 * exchange->wait_begun_after,
          1e3 * exchange->step_begun_after);
    }
  }
}

at::Tensor random_tokens(const model::ModelConfig& config, int64_t batch, int64_t time, at::Device device) {
  return at::randint(config.vocabulary, {batch, time}, at::TensorOptions(at::kLong).device(device));
}

model::Weights random_weights(const model::ModelConfig& config, at::ScalarType dtype, at::Device device) {
  model::Weights weights = model::initial_weights(config, /*seed=*/1, dtype);
  for (auto& [name, tensor] : weights.entries()) tensor = tensor.to(device);
  return weights;
}

// A mode that every model has.
std::string default_schedule(const model::ModelConfig& config) {
  return config.has_mode(Mode::linear) ? "linear" : "attention";
}

// Of a step: six for every weight of a matrix and token (three products of two); mixers and
// pointwise work not counted.
double training_flops(const model::ModelConfig& config, const Options& options) {
  const int64_t tokens = options.batch * options.length;
  double weights = 0;
  for (const model::ParameterSpec& spec : model::parameter_specs(config)) {
    // Each query projection serves its own tokens: together they cost one.
    const bool is_query = spec.name.ends_with("query.weight") && !spec.mixer.empty();
    const double share = is_query ? 1.0 / static_cast<double>(config.mixers.size()) : 1.0;
    if (spec.is_matrix) weights += share * static_cast<double>(spec.size());
  }
  return 6 * weights * static_cast<double>(tokens);
}

// What benchmark_train steps: a model and its optimizer, alone or with the other ranks as training has it.
class TrainSubject {
 public:
  TrainSubject(const Options& options, at::Device device, training::ProcessGroup* group)
      : options_(options),
        config_(read_model_config(options.source, options.overrides)),
        specs_(model::parameter_specs(config_)),
        device_(device),
        group_(group),
        waits_(device) {
    const at::ScalarType dtype = options.compute.resolve_dtype(), master = operators::accumulate_type(dtype);
    model::Weights weights = random_weights(config_, master, device);
    std::vector<training::Bucket> buckets;
    std::vector<at::Tensor> masters;
    if (group_) buckets = training::make_buckets(specs_, training::bucket_limit(master), group_->size());
    const std::vector<training::Piece> pieces =
        shards() ? pieces_of(buckets, group_->rank(), group_->size()) : std::vector<training::Piece>();
    if (shards()) masters = training::take_masters(weights, specs_, dtype, pieces);
    model_ = std::make_unique<model::LanguageModel>(config_, std::move(weights), dtype);
    model_->set_recompute_layers(options.recompute);
    optimizer_ = shards() ? std::make_unique<training::Optimizer>(model_->weights(), rates_, pieces, masters)
                          : std::make_unique<training::Optimizer>(model_->weights(), rates_);
    if (!group_) return;
    std::vector<at::Tensor> parameters;
    for (const auto& [name, tensor] : model_->weights().entries()) parameters.push_back(tensor);
    exchange_ = std::make_unique<training::GradientExchange>(parameters, buckets, *group_, shards());
  }

  const model::ModelConfig& config() const { return config_; }

  // `overlap`: whether sums are begun while backward goes on.
  void step(bool overlap) {
    const at::Tensor tokens = random_tokens(config_, options_.batch, options_.length + 1, device_);
    const at::Tensor hidden = model_->hidden(tokens.narrow(1, 0, options_.length), spans());
    const at::Tensor targets = tokens.narrow(1, 1, options_.length).reshape({-1});
    const double scale = 1.0 / static_cast<double>(options_.batch * options_.length * ranks());
    const at::Tensor loss = model_->loss(hidden, targets, scale).first;
    if (exchange_ && overlap) exchange_->expect_last_pass();
    loss.backward();
    if (exchange_) {
      waits_.start();
      if (!overlap) exchange_->expect_last_pass();
      exchange_->finish();
      waits_.stop();
    }
    update();
  }

  int64_t ranks() const { return group_ ? group_->size() : 1; }
  Stopwatch& waits() { return waits_; }

 private:
  bool shards() const { return group_ && options_.shard; }

  std::vector<ModeSpans> spans() const {
    std::vector<ModeSpans> spans;
    for (int64_t b = 0; b < options_.batch; ++b) {
      if (!options_.schedule.empty()) {
        spans.push_back(schedule::Schedule::parse(options_.schedule).spans(options_.length, options_.length));
      } else if (config_.is_switchable()) {
        spans.push_back(schedule::draw({}, options_.length, /*seed=*/1, step_, b));
      } else {
        spans.push_back(
            schedule::Schedule::parse(default_schedule(config_)).spans(options_.length, options_.length));
      }
    }
    return spans;
  }

  void update() {
    if (!shards()) {
      optimizer_->clip_and_update(step_++, 1e-4, 1.0);
      return optimizer_->clear_gradients();
    }
    optimizer_->clip_and_update(step_++, 1e-4, 1.0, exchange_->gradients(), *group_);
    exchange_->clear();
    training::share_weights(model_->weights(), *optimizer_, exchange_->buckets(), *group_);
  }

  const Options& options_;
  const model::ModelConfig config_;
  const std::vector<model::ParameterSpec> specs_;
  const at::Device device_;
  training::ProcessGroup* const group_;  // null: a process on its own
  const training::AdamwRates rates_;
  Stopwatch waits_;  // for the sums, from the end of a backward pass on
  std::unique_ptr<model::LanguageModel> model_;
  std::unique_ptr<training::Optimizer> optimizer_;
  std::unique_ptr<training::GradientExchange> exchange_;
  int64_t step_ = 0;
};

void benchmark_train(const Options& options, const training::Launch& launch, training::ProcessGroup* group) {
  const at::Device device = device_of(launch, options.compute.resolve_device());
  const c10::DeviceGuard guard(device);
  if (group) group->start(device, std::chrono::seconds(600));
  TrainSubject subject(options, device, group);
  const int64_t warmup = device.is_cpu() ? 1 : 3;
  Timing timing{"train",
                options.schedule.empty() ? "drawn" : options.schedule,
                options.batch * options.length * subject.ranks(),
                {}};
  timing.seconds = time_calls(device, warmup, options.repeats, [&] { subject.step(/*overlap=*/true); });
  if (!device.is_cpu()) {
    const double products = measure_ceilings(device, options.compute.resolve_dtype()).flops_per_second;
    timing.model_flops_share = training_flops(subject.config(), options) / median(timing.seconds) / products;
  }
  if (group) {
    const auto median_wait = [&] {
      const std::vector<double> waits = subject.waits().take();
      return median({waits.end() - options.repeats, waits.end()});
    };
    Timing::Exchange exchange{
        .ranks = subject.ranks(), .wait = median_wait(), .step = median(timing.seconds)};
    exchange.step_begun_after =
        median(time_calls(device, warmup, options.repeats, [&] { subject.step(/*overlap=*/false); }));
    exchange.wait_begun_after = median_wait();
    timing.exchange = exchange;
  }
  const bool leads = !group || group->leads();
  if (leads) report(options, timing);
  if (options.profile) {
    const std::vector<KernelTime> kernels = profile_kernels(device, [&] { subject.step(/*overlap=*/true); });
    if (leads) print_profile(kernels);
  }
  if (group) group->leave();
}

void benchmark_train(const Options& options) {
  as_launched([&](const training::Launch& launch, training::ProcessGroup* group) {
    benchmark_train(options, launch, group);
  });
}

// A model of random weights and the schedule it runs under.
struct Subject {
  explicit Subject(const Options& options)
      : config(read_model_config(options.source, options.overrides)),
        device(options.compute.resolve_device()),
        language_model(config, random_weights(config, options.compute.resolve_dtype(), device),
                       options.compute.resolve_dtype()),
        schedule(schedule::Schedule::parse(options.schedule.empty() ? default_schedule(config)
                                                                    : options.schedule)) {}

  model::ModelConfig config;
  at::Device device;
  model::LanguageModel language_model;
  schedule::Schedule schedule;
};

void benchmark_prefill(const Options& options) {
  const at::InferenceMode inference;
  const Subject subject(options);
  if (options.scored > options.length) {
    fail_usage("scored is {}: expected at most the {} tokens of a prompt", options.scored, options.length);
  }
  const at::Tensor tokens = random_tokens(subject.config, options.prompts, options.length, subject.device);
  Timing timing{"prefill", subject.schedule.text(), options.prompts * options.length, {}};
  timing.seconds = time_calls(subject.device, 1, options.repeats, [&] {
    if (options.scored > 0) {
      const auto last = [&](const at::Tensor& rows) {
        return rows.unflatten(0, {options.prompts, options.length})
            .narrow(1, options.length - options.scored, options.scored)
            .flatten(0, 1);
      };
      const at::Tensor hidden =
          subject.language_model.hidden(tokens, {subject.schedule.spans(options.length, options.length)});
      subject.language_model.loss(last(hidden), last(tokens.flatten()), 1.0).first.item<double>();
      return;
    }
    model::JointState state = subject.language_model.empty_state(options.prompts);
    at::Tensor hidden = subject.language_model.hidden(
        tokens, {subject.schedule.spans(options.length, options.length)}, &state);
    if (!options.all_logits) hidden = hidden.slice(0, options.length - 1, hidden.size(0), options.length);
    subject.language_model.logits(hidden).argmax(-1).max().item<int64_t>();
  });
  report(options, timing);
}

void benchmark_decode(const Options& options) {
  const at::InferenceMode inference;
  const Subject subject(options);
  const int64_t total = options.context + (options.repeats + 1) * options.tokens;
  const std::vector<ModeSpans> spans = {subject.schedule.spans(options.context, total)};
  model::JointState state = subject.language_model.empty_state(1);
  at::Tensor token = random_tokens(subject.config, 1, 1, subject.device);
  subject.language_model.hidden(random_tokens(subject.config, 1, options.context, subject.device), spans,
                                &state);
  Timing timing{"decode", subject.schedule.text(), options.tokens, {}};
  timing.seconds = time_calls(subject.device, 1, options.repeats, [&] {
    for (int64_t i = 0; i < options.tokens; ++i) {
      token =
          subject.language_model.logits(subject.language_model.hidden(token, spans, &state)).argmax(-1, true);
    }
    token.max().item<int64_t>();
  });
  report(options, timing);
}

void print_operators(const std::vector<OperatorTime>& times, const Ceilings& ceilings) {
  fmt::print("{:<28} {:>9} {:>9} {:>7} {:>9} {:>9}\n", "operator", "ms", "floor", "ratio", "TFLOP/s", "TB/s");
  for (const OperatorTime& time : times) {
    fmt::print("{:<28} {:>9.4f} {:>9.4f} {:>7.2f} {:>9.1f} {:>9.2f}\n", time.name, 1e3 * time.seconds,
               1e3 * time.floor(ceilings), time.seconds / time.floor(ceilings),
               1e-12 * time.flops / time.seconds, 1e-12 * time.bytes / time.seconds);
  }
}

void benchmark_operators(const Options& options) {
  const at::Device device = options.compute.resolve_device();
  const at::ScalarType dtype = options.compute.resolve_dtype();
  const Ceilings ceilings = measure_ceilings(device, dtype);
  const std::vector<OperatorTime> times =
      measure_operators({options.batch, options.length, options.heads, options.head_dim}, device, dtype,
                        options.filter, options.repeats);
  if (!options.json) {
    fmt::print(
        "{} sequences of {} tokens, {} heads of {}, {}; matrix product {:.0f} TFLOP/s, copy {:.2f} TB/s\n",
        options.batch, options.length, options.heads, options.head_dim, options.compute.dtype,
        1e-12 * ceilings.flops_per_second, 1e-12 * ceilings.bytes_per_second);
    return print_operators(times, ceilings);
  }
  Table table;
  table.set("benchmark", Value{std::string("operators")});
  table.set("batch", Value{options.batch});
  table.set("length", Value{options.length});
  table.set("heads", Value{options.heads});
  table.set("head_dim", Value{options.head_dim});
  table.set("dtype", Value{options.compute.dtype});
  table.set("flops_per_second", Value{ceilings.flops_per_second});
  table.set("bytes_per_second", Value{ceilings.bytes_per_second});
  Table seconds, floors;
  for (const OperatorTime& time : times) {
    seconds.set(time.name, Value{time.seconds});
    floors.set(time.name, Value{time.floor(ceilings)});
  }
  table.set("seconds", Value{seconds});
  table.set("floor_seconds", Value{floors});
  fmt::print("{}\n", formats::to_json(table));
}

void add(CLI::App* parent, const std::string& name, const std::string& help, void (*run)(const Options&),
         const std::function<void(CLI::App*, Options&)>& add_own) {
  CLI::App* command = parent->add_subcommand(name, help);
  const auto options = std::make_shared<Options>();
  command->add_option("--repeats", options->repeats, "timed repeats")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_flag("--json", options->json, "machine-readable");
  options->compute.add_to(*command);
  add_own(command, *options);
  command->callback([options, run] { run(*options); });
}

void add_source(CLI::App* command, Options& options) {
  command->add_option("source", options.source, "a recipe or a model directory, for its sizes")->required();
  command->add_option("overrides", options.overrides, "section.key=value, for a recipe");
  command->add_option("--schedule", options.schedule, "which mixer serves which tokens");
}

CLI::Option* count(CLI::App* command, const std::string& flag, int64_t& value, const std::string& help) {
  return command->add_option(flag, value, help)->check(CLI::PositiveNumber)->capture_default_str();
}

}  // namespace

void add_benchmark(CLI::App& app) {
  CLI::App* benchmark = app.add_subcommand("benchmark", "Time training, prefill, decoding and operators");
  benchmark->require_subcommand(1);
  add(benchmark, "train", "A step: forward, backward, clip, AdamW; under torchrun with its exchange",
      benchmark_train, [](CLI::App* command, Options& options) {
        add_source(command, options);
        count(command, "--batch", options.batch, "sequences");
        count(command, "--length", options.length, "tokens of a sequence");
        command->add_flag("--recompute", options.recompute,
                          "run layers again in backward: training.recompute");
        command->add_flag("--shard-optimizer", options.shard, "under torchrun: training.shard_optimizer");
        command->add_flag("--profile", options.profile, "a table of a GPU's time by part and kernel");
      });
  add(benchmark, "prefill", "A prompt up to its first new token", benchmark_prefill,
      [](CLI::App* command, Options& options) {
        add_source(command, options);
        count(command, "--batch", options.prompts, "prompts");
        count(command, "--length", options.length, "tokens of a prompt");
        command->add_flag("--all-logits", options.all_logits, "logits of every token, not of the last alone");
        command
            ->add_option(
                "--scored", options.scored,
                "log-likelihoods of this many last tokens instead, as evaluate has them, and no state")
            ->check(CLI::NonNegativeNumber)
            ->capture_default_str();
      });
  add(benchmark, "decode", "One token at a time", benchmark_decode, [](CLI::App* command, Options& options) {
    add_source(command, options);
    count(command, "--context", options.context, "tokens read before");
    count(command, "--tokens", options.tokens, "tokens of a repeat");
  });
  add(benchmark, "operators", "Operators, forward and backward, beside their floors", benchmark_operators,
      [](CLI::App* command, Options& options) {
        count(command, "--batch", options.batch, "sequences");
        count(command, "--length", options.length, "tokens of a sequence");
        count(command, "--heads", options.heads, "heads");
        count(command, "--head-dim", options.head_dim, "width of a head");
        command->add_option("--filter", options.filter, "only operators whose name contains this");
      });
}

}  // namespace oryx::cli
