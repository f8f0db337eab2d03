// oryx benchmark: tokens a second of a training step, a prefill, and decoding, on random weights and tokens.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "base/error.h"
#include "cli/commands.h"
#include "cli/model_source.h"
#include "cli/options.h"
#include "formats/json.h"
#include "model/language_model.h"
#include "schedule/schedule.h"
#include "schedule/training_draw.h"
#include "training/optimizer.h"

namespace oryx::cli {

namespace {

using schedule::Mode;
using schedule::ModeSpans;

struct Options {
  std::string source;
  std::vector<std::string> overrides;
  ComputeOptions compute;
  std::string schedule;
  int64_t batch = 8, length = 2048, context = 2048, tokens = 32, repeats = 5;
  bool all_logits = false, json = false;
};

struct Timing {
  std::string what;
  std::string schedule;
  int64_t tokens_per_repeat = 0;
  std::vector<double> seconds;  // one a repeat
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The most memory this process has held, in bytes.
int64_t peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * 1024;
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
    table.set("peak_memory_bytes", Value{peak_memory()});
    fmt::print("{}\n", formats::to_json(table));
  } else {
    fmt::print("{} {} {} {}: {:.1f} tok/s best, {:.1f} median of {}, peak memory {:.2f} GiB\n", timing.what,
               options.source, options.compute.dtype, timing.schedule, best, median, timing.seconds.size(),
               static_cast<double>(peak_memory()) / (1 << 30));
  }
}

at::Tensor random_tokens(const model::ModelConfig& config, int64_t batch, int64_t time, at::Device device) {
  return at::randint(config.vocabulary, {batch, time}, at::TensorOptions(at::kLong)).to(device);
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

void benchmark_train(const Options& options) {
  const model::ModelConfig config = read_model_config(options.source, options.overrides);
  const at::ScalarType dtype = options.compute.resolve_dtype();
  const at::Device device = options.compute.resolve_device();
  const at::ScalarType master = dtype == at::kDouble ? at::kDouble : at::kFloat;
  model::LanguageModel language_model(config, random_weights(config, master, device), dtype);
  training::Optimizer optimizer(language_model.weights(), {});

  Timing timing{
      "train", options.schedule.empty() ? "drawn" : options.schedule, options.batch * options.length, {}};
  for (int64_t step = 0; step <= options.repeats; ++step) {
    const at::Tensor tokens = random_tokens(config, options.batch, options.length + 1, device);
    std::vector<ModeSpans> spans;
    for (int64_t b = 0; b < options.batch; ++b) {
      if (!options.schedule.empty()) {
        spans.push_back(schedule::Schedule::parse(options.schedule).spans(options.length, options.length));
      } else if (config.is_switchable()) {
        spans.push_back(schedule::draw({}, options.length, /*seed=*/1, step, b));
      } else {
        spans.push_back(
            schedule::Schedule::parse(default_schedule(config)).spans(options.length, options.length));
      }
    }
    const double start = now();
    const at::Tensor hidden = language_model.hidden(tokens.narrow(1, 0, options.length), spans);
    const at::Tensor targets = tokens.narrow(1, 1, options.length).reshape({-1});
    const double scale = 1.0 / static_cast<double>(timing.tokens_per_repeat);
    language_model.loss(hidden, targets, scale).first.backward();
    optimizer.update(step, 1e-4, training::clip_scale(optimizer.gradient_norm(), 1.0));
    optimizer.clear_gradients();
    if (step > 0) timing.seconds.push_back(now() - start);  // the first step warms up
  }
  report(options, timing);
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
  const at::Tensor tokens = random_tokens(subject.config, 1, options.length, subject.device);
  Timing timing{"prefill", subject.schedule.text(), options.length, {}};
  for (int64_t repeat = 0; repeat <= options.repeats; ++repeat) {
    model::JointState state = subject.language_model.empty_state(1);
    const double start = now();
    const at::Tensor hidden = subject.language_model.hidden(
        tokens, {subject.schedule.spans(options.length, options.length)}, &state);
    const at::Tensor logits =
        subject.language_model.logits(options.all_logits ? hidden : hidden.slice(0, -1));
    logits.select(0, -1).argmax().item<int64_t>();
    if (repeat > 0) timing.seconds.push_back(now() - start);
  }
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
  for (int64_t repeat = 0; repeat <= options.repeats; ++repeat) {
    const double start = now();
    for (int64_t i = 0; i < options.tokens; ++i) {
      token =
          subject.language_model.logits(subject.language_model.hidden(token, spans, &state)).argmax(-1, true);
    }
    token.max().item<int64_t>();
    if (repeat > 0) timing.seconds.push_back(now() - start);
  }
  report(options, timing);
}

void add(CLI::App* parent, const std::string& name, const std::string& help, void (*run)(const Options&),
         const std::function<void(CLI::App*, Options&)>& add_own) {
  CLI::App* command = parent->add_subcommand(name, help);
  const auto options = std::make_shared<Options>();
  command->add_option("source", options->source, "a recipe or a model directory, for its sizes")->required();
  command->add_option("overrides", options->overrides, "section.key=value, for a recipe");
  command->add_option("--schedule", options->schedule, "which mixer serves which tokens");
  command->add_option("--repeats", options->repeats, "timed repeats")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_flag("--json", options->json, "machine-readable");
  options->compute.add_to(*command);
  add_own(command, *options);
  command->callback([options, run] { run(*options); });
}

CLI::Option* count(CLI::App* command, const std::string& flag, int64_t& value, const std::string& help) {
  return command->add_option(flag, value, help)->check(CLI::PositiveNumber)->capture_default_str();
}

}  // namespace

void add_benchmark(CLI::App& app) {
  CLI::App* benchmark = app.add_subcommand("benchmark", "Time training, prefill and decoding");
  benchmark->require_subcommand(1);
  add(benchmark, "train", "A step: forward, backward, clip, AdamW", benchmark_train,
      [](CLI::App* command, Options& options) {
        count(command, "--batch", options.batch, "sequences");
        count(command, "--length", options.length, "tokens of a sequence");
      });
  add(benchmark, "prefill", "A prompt up to its first new token", benchmark_prefill,
      [](CLI::App* command, Options& options) {
        count(command, "--length", options.length, "tokens of the prompt");
        command->add_flag("--all-logits", options.all_logits, "logits of every token, not of the last alone");
      });
  add(benchmark, "decode", "One token at a time", benchmark_decode, [](CLI::App* command, Options& options) {
    count(command, "--context", options.context, "tokens read before");
    count(command, "--tokens", options.tokens, "tokens of a repeat");
  });
}

}  // namespace oryx::cli
