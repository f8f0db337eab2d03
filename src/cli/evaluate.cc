// oryx evaluate: tasks × schedules → a directory of results (docs/evaluation.md).
#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "cli/commands.h"
#include "cli/evaluate_table.h"
#include "cli/model_source.h"
#include "cli/model_tokenizer.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "evaluation/results.h"
#include "evaluation/task.h"
#include "formats/file.h"
#include "formats/json.h"
#include "model/cost.h"
#include "model/language_model.h"
#include "model/weights.h"

namespace oryx::cli {

namespace {

namespace fs = std::filesystem;
using evaluation::ScheduleForm;
using evaluation::Task;
using evaluation::TaskOptions;
using evaluation::TaskResult;
using Clock = std::chrono::steady_clock;

struct Options {
  std::string model, output, limit, too_long = "cut", switch_at;
  std::vector<std::string> tasks, schedules, retrieval;
  TaskOptions task;
  int64_t batch_tokens = 0;
  bool has_limit = false;
  bool json = false;
  ComputeOptions compute;
};

int64_t parse_limit(const std::string& text) {
  int64_t limit = 0;
  size_t end = 0;
  try {
    limit = std::stoll(text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  if (end == 0 || end != text.size() || limit < 1) {
    fail_usage("limit is '{}': expected a number of items, at least 1", text);
  }
  return limit;
}

void check(Options& options) {
  TaskOptions& task = options.task;
  if (options.has_limit) task.limit = parse_limit(options.limit);
  task.refuse_long = options.too_long == "refuse";
  for (const std::string& text : options.retrieval) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos) fail_usage("retrieval '{}': expected NAME=FILE.jsonl", text);
    evaluation::add_retrieval(text.substr(0, equals), text.substr(equals + 1), task);
  }
  options.tasks = evaluation::expand_tasks(options.tasks, task);
  if (options.tasks.empty()) fail_usage("no tasks: expected --tasks or --retrieval");
  evaluation::validate(task);
  if (options.batch_tokens < 0) fail_usage("batch-tokens is {}: expected at least 1", options.batch_tokens);
}

std::vector<ScheduleForm> read_schedules(const Options& options, const model::ModelConfig& config) {
  std::vector<std::string> texts = options.schedules;
  if (texts.empty()) texts = {config.has_mode(schedule::Mode::attention) ? "attention" : "linear"};
  std::vector<ScheduleForm> forms;
  for (const std::string& text : texts) {
    forms.push_back(ScheduleForm::parse(text));
    forms.back().expect_served_by(config);
  }
  return forms;
}

// FROM->TO where the user or the task has it.
ScheduleForm schedule_of(const ScheduleForm& form, const Task& task, const Options& options) {
  return form.split_at(options.switch_at.empty() ? task.default_split() : options.switch_at);
}

// This process's command, as a shell would read it.
std::string command_text() {
  const std::string bytes = formats::read_file("/proc/self/cmdline");
  std::string text;
  for (size_t at = 0; at < bytes.size();) {
    const std::string word = bytes.c_str() + at;
    at += word.size() + 1;
    const bool plain = word.find_first_not_of(
                           "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                           "@%+=:,./_-") == std::string::npos;
    text += text.empty() ? "oryx" : plain && !word.empty() ? " " + word : " '" + word + "'";
  }
  return text;
}

// A run's name is that of the directory of its checkpoints.
std::string model_name(const fs::path& directory) {
  const fs::path parent = directory.parent_path();
  return (parent.filename() == "checkpoints" ? parent.parent_path() : directory).filename().string();
}

Array to_array(const std::vector<int64_t>& numbers) {
  Array array;
  for (const int64_t number : numbers) array.push_back(Value{number});
  return array;
}

// All that a score depends on besides model and data.
Table settings_table(const Options& options) {
  const TaskOptions& task = options.task;
  const auto absolute = [](const std::string& path) {
    return Value{path.empty() ? std::string() : fs::weakly_canonical(path).string()};
  };
  Array depths;
  for (const double depth : task.needle_depths) depths.push_back(Value{depth});
  Table table;
  table.set("data", absolute(task.data));
  table.set("max_length", Value{task.max_length});
  table.set("too_long", Value{options.too_long});
  table.set("context_tokens", Value{task.context_tokens});
  table.set("max_new_tokens", Value{task.max_new_tokens});
  table.set("switch_at", Value{options.switch_at});
  table.set("essay", absolute(task.essay));
  table.set("needle_lengths", Value{to_array(task.needle_lengths)});
  table.set("needle_depths", Value{std::move(depths)});
  table.set("needle_samples", Value{task.needle_samples});
  table.set("mqar_length", Value{task.mqar_length});
  table.set("mqar_pairs", Value{to_array(task.mqar_pairs)});
  table.set("mqar_samples", Value{task.mqar_samples});
  Table files;
  for (const auto& [name, file] : task.retrieval) files.set(name, absolute(file));
  table.set("retrieval", Value{std::move(files)});
  return table;
}

Table header_of(const Options& options, const model::ModelConfig& config, c10::Device device) {
  const fs::path directory = options.model;
  Array mixers;
  for (const std::string& mixer : config.mixers) mixers.push_back(Value{mixer});
  Table model;
  model.set("directory", Value{directory.string()});
  model.set("name", Value{model_name(directory)});
  model.set("mixers", Value{std::move(mixers)});
  model.set("parameters", Value{model::count_parameters(config).total});
  model.set("weights", Value{weights_checksum(directory)});
  model.set("config", Value{formats::read_json((directory / "config.json").string())});
  Table header;
  header.set("model", Value{std::move(model)});
  header.set("device", Value{std::string(device.is_cpu() ? "cpu" : "cuda")});
  header.set("dtype", Value{options.compute.dtype});
  header.set("seed", Value{static_cast<int64_t>(options.task.seed)});
  header.set("limit", options.task.limit ? Value{*options.task.limit} : Value{nullptr});
  header.set("settings", Value{settings_table(options)});
  return header;
}

// A task that some schedule still needs, read before any weights are.
std::vector<std::unique_ptr<const Task>> read_tasks(const Options& options,
                                                    const std::vector<ScheduleForm>& schedules,
                                                    const evaluation::ResultStore& store,
                                                    const tokenizer::Tokenizer& tokenizer) {
  std::vector<std::unique_ptr<const Task>> tasks;
  for (const std::string& name : options.tasks) {
    bool wanted = false;
    for (const ScheduleForm& schedule : schedules) wanted = wanted || !store.has(schedule.text(), name);
    if (!wanted) continue;
    tasks.push_back(evaluation::make_task(name, options.task, tokenizer));
    for (const ScheduleForm& schedule : schedules) {
      const ScheduleForm filled = schedule_of(schedule, *tasks.back(), options);
      if (filled.needs_query() && !tasks.back()->has_query()) {
        fail_usage("schedule '{}' names a query, which {} does not have", filled.text(), name);
      }
    }
  }
  return tasks;
}

void run_task(const Task& task, const ScheduleForm& form, const Options& options,
              const evaluation::Runner& base, evaluation::ResultStore& store) {
  const ScheduleForm schedule = schedule_of(form, task, options);
  ProgressBar bar(task.steps(), fmt::format("{} {}", task.name(), form.text()));
  evaluation::Runner runner = base;
  runner.on_items = [&](int64_t done) { bar.advance(done); };
  const Clock::time_point start = Clock::now();
  const std::optional<TaskResult> result = task.run(schedule, runner);
  if (!result) throw Interrupted{};
  const std::chrono::duration<double> seconds = Clock::now() - start;
  store.add(form.text(), task, schedule.text(), *result, seconds.count());
  if (result->items_cut > 0) {
    log("{}: the context of {} of {} items was longer than allowed and was cut", task.name(),
        result->items_cut, result->items);
  }
}

void evaluate(Options& options) {
  check(options);
  const c10::ScalarType dtype = options.compute.resolve_dtype();
  const c10::Device device = options.compute.resolve_device();
  expect(!fs::exists(options.output) || fs::is_directory(options.output),
         "cannot write into {}: it is not a directory", options.output);
  expect(fs::is_directory(options.model), "no such model directory: {}", options.model);
  // A run's `latest` may move on while this works: everything is of the checkpoint that it names now.
  options.model = fs::canonical(options.model).string();
  const model::ModelConfig config = model::load_config(options.model);
  const std::vector<ScheduleForm> schedules = read_schedules(options, config);
  const auto tokenizer = load_tokenizer(options.model, config);
  Table header = header_of(options, config, device);
  header.set("command", Value{command_text()});
  evaluation::ResultStore store(options.output, std::move(header));
  const auto tasks = read_tasks(options, schedules, store, *tokenizer);

  if (!tasks.empty()) {
    const auto model = model::LanguageModel::load(options.model, dtype, device);
    watch_for_interrupt();
    const int64_t batch_tokens = options.batch_tokens > 0 ? options.batch_tokens
                                 : device.is_cpu()        ? 4096
                                                          : 65536;
    const evaluation::Runner runner{
        .model = model, .tokenizer = *tokenizer, .batch_tokens = batch_tokens, .cancelled = [] {
          return interrupted().load();
        }};
    for (const ScheduleForm& schedule : schedules) {
      for (const auto& task : tasks) {
        if (!store.has(schedule.text(), task->name())) run_task(*task, schedule, options, runner, store);
      }
    }
  }
  if (options.json) {
    fmt::print("{}\n", formats::to_json(store.table()));
  } else {
    fmt::print("{}", evaluation_table(store.table(), terminal_columns()));
    log("results are in {}", (fs::path(options.output) / "results.json").string());
  }
}

}  // namespace

void add_evaluate(CLI::App& app) {
  CLI::App* command = app.add_subcommand("evaluate", "Score a model on tasks, under one schedule or several");
  const auto options = std::make_shared<Options>();
  TaskOptions& task = options->task;
  command->add_option("model", options->model, "a model directory")->required();
  command
      ->add_option("--tasks", options->tasks,
                   "names of tasks, groups (language, retrieval, needle, recall), all, or .jsonl files of "
                   "questions")
      ->delimiter(',');
  command->add_option("--data", task.data, "directory of the tasks' data files");
  command
      ->add_option(
          "--retrieval", options->retrieval,
          "NAME=FILE.jsonl: questions of your own, an object with context, prompt and answers a line")
      ->allow_extra_args(false);
  command
      ->add_option("--schedule", options->schedules,
                   "which mixer serves which token; repeat it for a sweep (default: attention)")
      ->allow_extra_args(false);
  command->add_option(
      "--switch-at", options->switch_at,
      "where FROM->TO switches: a START of schedules, or query (default: 97.5%; query for needle "
      "and recall tasks)");
  command->add_option("--output", options->output, "directory for results.json and items/")->required();
  command->add_option("--limit", options->limit, "items of each task at most")
      ->each([options = options.get()](const std::string&) { options->has_limit = true; });
  command->add_option("--seed", task.seed, "of the tasks made on the fly")->capture_default_str();
  command
      ->add_option(
          "--max-length", task.max_length,
          "tokens that scoring reads at once: longer items are cut on the left, long texts go by windows")
      ->capture_default_str();
  command->add_option("--too-long", options->too_long, "what to do with longer items: cut or refuse")
      ->check(CLI::IsMember({"cut", "refuse"}))
      ->capture_default_str();
  command
      ->add_option("--context-tokens", task.context_tokens,
                   "tokens of a retrieval prompt: the end of a longer context is cut, the question never")
      ->capture_default_str();
  command->add_option("--max-new-tokens", task.max_new_tokens, "tokens of an answer at most")
      ->capture_default_str();
  command->add_option("--essay", task.essay,
                      "text file for the haystacks of essays (default: essay.txt of the data)");
  command
      ->add_option("--needle-lengths", task.needle_lengths, "tokens of needle tasks, the answer's included")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--needle-depths", task.needle_depths, "per cent of the haystack before the needle")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--needle-samples", task.needle_samples, "of each length, spread over the depths")
      ->capture_default_str();
  command->add_option("--mqar-length", task.mqar_length, "tokens of a sequence of associative recall")
      ->capture_default_str();
  command->add_option("--mqar-pairs", task.mqar_pairs, "pairs of keys and values in it")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--mqar-samples", task.mqar_samples, "of each number of pairs")->capture_default_str();
  command->add_option("--batch-tokens", options->batch_tokens,
                      "tokens of a batch, padding included (default: 4096, on a GPU 65536)");
  command->add_flag("--json", options->json, "print results.json instead of the table");
  options->compute.add_to(*command);
  command->callback([options] { evaluate(*options); });
}

}  // namespace oryx::cli
