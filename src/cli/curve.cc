// oryx curve: perplexity by position for several schedules, as JSON, as a picture and on the terminal.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "cli/commands.h"
#include "cli/model_tokenizer.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "evaluation/curve.h"
#include "formats/file.h"
#include "formats/json.h"
#include "formats/token_shards.h"
#include "tokenizer/text_reader.h"

namespace oryx::cli {

namespace {

using schedule::Mode;
using schedule::Schedule;

struct Options {
  std::string model, data, output, color = "auto";
  std::vector<std::string> switches;
  bool paper_switches = false;
  int64_t windows = 32, length = 0, smooth = 64, batch = 4;
  uint64_t seed = 0;
  bool json = false;
  ComputeOptions compute;
};

void expect_at_least_one(const char* name, int64_t value) {
  if (value < 1) fail_usage("{} is {}: expected at least 1", name, value);
}

// One mode throughout, as far as the model has it, then the schedules asked for.
std::vector<Schedule> schedules_of(const Options& options, const model::ModelConfig& config) {
  std::vector<Schedule> schedules;
  for (const Mode mode : {Mode::attention, Mode::linear}) {
    if (config.has_mode(mode)) schedules.push_back(Schedule::parse(schedule::mode_name(mode)));
  }
  std::vector<std::string> texts = options.switches;
  if (options.paper_switches) {
    expect(config.is_switchable(), "{} has one mode: there are no switches to measure", options.model);
    const std::vector<std::string> paper = evaluation::paper_switches(options.length);
    texts.insert(texts.begin(), paper.begin(), paper.end());
  }
  if (texts.empty() && config.is_switchable()) texts = {"attention,linear@50%", "linear,attention@50%"};
  for (const std::string& text : texts) {
    const Schedule schedule = Schedule::parse(text);
    if (std::find(schedules.begin(), schedules.end(), schedule) == schedules.end())
      schedules.push_back(schedule);
  }
  return schedules;
}

// int64 [windows, length + 1].
at::Tensor windows_of(int64_t tokens, const Options& options,
                      const std::function<void(int64_t begin, int64_t count, int64_t* out)>& copy) {
  expect(tokens > options.length, "{} holds {} tokens: a window of length {} needs {}", options.data, tokens,
         options.length, options.length + 1);
  const std::vector<int64_t> starts = evaluation::window_starts(tokens, options.length, options.windows);
  if (static_cast<int64_t>(starts.size()) < options.windows) {
    log("{} holds only {} windows of {} tokens", options.data, starts.size(), options.length);
  }
  at::Tensor windows = at::empty({static_cast<int64_t>(starts.size()), options.length + 1}, at::kLong);
  int64_t* out = windows.mutable_data_ptr<int64_t>();
  for (const int64_t start : starts) {
    copy(start, options.length + 1, out);
    out += options.length + 1;
  }
  return windows;
}

at::Tensor read_windows(const Options& options, const model::ModelConfig& config) {
  expect(std::filesystem::exists(options.data), "no such text file or shard directory: {}", options.data);
  const auto tokenizer = load_tokenizer(options.model, config);
  if (std::filesystem::is_directory(options.data)) {
    const formats::TokenShards shards(options.data);
    expect(shards.tokenizer() == tokenizer->identity(),
           "{} was made with tokenizer {}, but the model's is {}", options.data, shards.tokenizer(),
           tokenizer->identity());
    return windows_of(shards.size(), options,
                      [&](int64_t begin, int64_t count, int64_t* out) { shards.copy(begin, count, out); });
  }
  std::vector<int32_t> ids;
  const std::optional<int32_t> end = end_of_text(*tokenizer);
  tokenizer::TextReader reader(tokenizer::find_text_files({options.data}));
  for (tokenizer::TextPiece piece; reader.next(piece);) {
    tokenizer->encode_to(piece.bytes, /*allow_special=*/false, ids);
    if (end) ids.push_back(*end);
  }
  return windows_of(static_cast<int64_t>(ids.size()), options,
                    [&](int64_t begin, int64_t count, int64_t* out) {
                      std::copy(ids.begin() + begin, ids.begin() + begin + count, out);
                    });
}

void print_table(const std::vector<evaluation::Curve>& curves) {
  fmt::print("\n{:<44} {:>10}\n", "schedule", "perplexity");
  for (const evaluation::Curve& curve : curves) {
    fmt::print("{:<44} {:>10.3f}\n", curve.schedule, std::exp(curve.loss.mean().item<double>()));
  }
  bool heading = false;
  for (const evaluation::Curve& curve : curves) {
    for (const evaluation::SwitchReport& report : report_switches(curve, curves)) {
      if (!heading)
        fmt::print("\nloss beyond the unswitched curve of the mode switched to, over the tokens after\n");
      heading = true;
      fmt::print("{} at {} to {}:", curve.schedule, report.position, schedule::mode_name(report.to));
      for (const evaluation::Excess& excess : report.excess) {
        fmt::print("  {}-{} {:+.3f} ± {:.3f}", excess.begin, excess.end, excess.mean, excess.standard_error);
      }
      fmt::print("\n");
    }
  }
}

void curve(const Options& options) {
  expect_at_least_one("windows", options.windows);
  expect_at_least_one("length", options.length);
  expect_at_least_one("smooth", options.smooth);
  expect_at_least_one("batch", options.batch);
  for (const std::string& text : options.switches)
    Schedule::parse(text).spans(options.length, options.length);
  const c10::ScalarType dtype = options.compute.resolve_dtype();
  const c10::Device device = options.compute.resolve_device();
  const std::filesystem::path directory = options.output;
  expect(!std::filesystem::exists(directory) || std::filesystem::is_directory(directory),
         "cannot write into {}: it is not a directory", options.output);
  expect(std::filesystem::is_directory(options.model), "no such model directory: {}", options.model);
  const model::ModelConfig config = model::load_config(options.model);
  const std::vector<Schedule> schedules = schedules_of(options, config);
  const at::Tensor windows = read_windows(options, config);
  const auto model = model::LanguageModel::load(options.model, dtype, device);

  watch_for_interrupt();
  std::vector<evaluation::Curve> curves;
  {
    ProgressBar bar(windows.size(0), "curve", {.unit = "windows"});
    curves = evaluation::measure_curves(model, schedules, windows,
                                        {.batch = options.batch,
                                         .on_windows = [&](int64_t done) { bar.advance(done); },
                                         .cancelled = [] { return interrupted().load(); }});
  }
  if (curves.empty()) throw Interrupted{};

  Table table;
  table.set("format", Value{std::string("oryx.curve")});
  table.set("version", Value{int64_t{1}});
  table.set("model", Value{options.model});
  table.set("data", Value{options.data});
  table.set("dtype", Value{options.compute.dtype});
  table = overlay(table, evaluation::curve_table(curves, options.smooth));
  const std::vector<evaluation::Plot> plots = evaluation::curve_plots(curves, options.smooth);
  const std::string json = formats::to_json(table);
  std::filesystem::create_directories(directory);
  formats::write_file_atomic((directory / "curve.json").string(), json + "\n");
  formats::write_file_atomic((directory / "curve.svg").string(), evaluation::to_svg(plots));
  if (options.json) {
    fmt::print("{}\n", json);
    return;
  }
  const int columns = std::min(terminal_columns(), 120);
  for (const evaluation::Plot& plot : plots) {
    fmt::print("{}\n", evaluation::to_terminal(plot, columns, 18, use_colour(options.color)));
  }
  print_table(curves);
  log("wrote {}", (directory / "curve.json").string());
  log("wrote {}", (directory / "curve.svg").string());
}

}  // namespace

void add_curve(CLI::App& app) {
  CLI::App* command = app.add_subcommand("curve", "Perplexity by position for several schedules");
  const auto options = std::make_shared<Options>();
  command->add_option("model", options->model, "a model directory")->required();
  command->add_option("--data", options->data, "a text file, or a directory of token shards")->required();
  command->add_option("--switch", options->switches,
                      "schedules to measure beside each mode alone (default: halfway, both ways)");
  command
      ->add_option_function<std::string>(
          "--switches", [options](const std::string&) { options->paper_switches = true; },
          "a set of schedules: paper, the 14 of the paper's curves, at their share of the length")
      ->check(CLI::IsMember({"paper"}));
  command->add_option("--output", options->output, "directory for curve.json and curve.svg")->required();
  command->add_option("--windows", options->windows, "windows of text, spread evenly over the data")
      ->capture_default_str();
  command->add_option("--length", options->length,
                      "tokens of a window (default: 1024; 2048 with --switches paper)");
  command
      ->add_option("--smooth", options->smooth, "positions that the centred moving average of the loss spans")
      ->capture_default_str();
  command->add_option("--batch", options->batch, "windows in one forward pass")->capture_default_str();
  command->add_option("--seed", options->seed, "accepted for uniformity: nothing is drawn here");
  command->add_option("--color", options->color, "auto, always or never")
      ->check(CLI::IsMember({"auto", "always", "never"}))
      ->capture_default_str();
  command->add_flag("--json", options->json, "print curve.json instead of the plot");
  options->compute.add_to(*command);
  command->callback([options, command] {
    if (command->count("--length") == 0) options->length = options->paper_switches ? 2048 : 1024;
    curve(*options);
  });
}

}  // namespace oryx::cli
