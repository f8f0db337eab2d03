// oryx generate: continues a text, each token coloured by the mixer that serves it.
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "base/value.h"
#include "cli/commands.h"
#include "cli/model_tokenizer.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "formats/file.h"
#include "formats/json.h"
#include "generation/generator.h"
#include "generation/text_stream.h"
#include "model/language_model.h"

namespace oryx::cli {

namespace {

using generation::Completion;
using generation::FinishReason;
using generation::TextStream;
using generation::Token;
using schedule::Mode;
using Clock = std::chrono::steady_clock;

struct Options {
  std::string model, prompt, prompt_file, schedule, color = "auto";
  int64_t max_tokens = 256;
  generation::SamplingOptions sampling;
  std::vector<std::string> stops;
  bool echo = false;
  bool json = false;
  ComputeOptions compute;
};

std::string read_prompt(const Options& options) {
  const std::string text =
      options.prompt_file.empty()
          ? options.prompt
          : formats::read_file(options.prompt_file == "-" ? "/dev/stdin" : options.prompt_file);
  expect(!text.empty(), "the prompt is empty: expected at least one character{}",
         options.prompt_file.empty() ? "" : " in " + options.prompt_file);
  return text;
}

// Tokens → standard output, or into a string for --json.
class Output {
 public:
  Output(const Options& options, const tokenizer::Tokenizer& tokenizer)
      : tokenizer_(tokenizer),
        stream_(options.stops),
        json_(options.json),
        colour_(use_colour(options.color)) {}
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  // A terminal is left as it was found, whatever ended the text.
  ~Output() {
    if (shown_ >= 0) std::fputs(colour_end().c_str(), stdout);
  }

  // False once a stop string is complete.
  bool push(int64_t id, Mode mode) {
    const auto token = static_cast<int32_t>(id);
    if (tokenizer_.is_special(token)) return true;
    take(stream_.push(tokenizer_.token_bytes(token), static_cast<int>(mode)));
    return !stream_.stopped();
  }

  // Stop strings do not count in the prompt.
  void read_prompt(const std::vector<int64_t>& prompt, const schedule::ModeSpans& modes, bool echo) {
    TextStream stream;
    auto span = modes.begin();
    const auto take = [&](const std::vector<TextStream::Piece>& pieces) {
      collect(pieces, /*prompt=*/true);
      if (echo) show(pieces);
    };
    for (int64_t position = 0; position < static_cast<int64_t>(prompt.size()); ++position) {
      if (position == span->end) ++span;
      const auto bytes = tokenizer_.token_bytes(static_cast<int32_t>(prompt[position]));
      take(stream.push(bytes, static_cast<int>(span->mode)));
    }
    take(stream.finish());
  }

  void finish() {
    take(stream_.finish());
    if (shown_ >= 0) write(colour_end());
    shown_ = -1;
    if (!json_ && !text_.empty() && text_.back() != '\n') write("\n");
  }

  const std::string& text() const { return text_; }

  // Prompt and new text in pieces of one mode, for --json.
  Array pieces() const {
    Array rows;
    for (const Piece& piece : pieces_) {
      Table row;
      row.set("text", Value{piece.text});
      row.set("mode", Value{std::string(schedule::mode_name(piece.mode))});
      row.set("prompt", Value{piece.prompt});
      rows.push_back(Value{std::move(row)});
    }
    return rows;
  }

 private:
  struct Piece {
    std::string text;
    Mode mode;
    bool prompt;
  };

  void take(const std::vector<TextStream::Piece>& pieces) {
    collect(pieces, /*prompt=*/false);
    show(pieces);
  }

  void collect(const std::vector<TextStream::Piece>& pieces, bool prompt) {
    if (!json_) return;
    for (const TextStream::Piece& piece : pieces) {
      const Mode mode = static_cast<Mode>(piece.tag);
      if (pieces_.empty() || pieces_.back().mode != mode || pieces_.back().prompt != prompt) {
        pieces_.push_back({"", mode, prompt});
      }
      pieces_.back().text += piece.text;
    }
  }

  void show(const std::vector<TextStream::Piece>& pieces) {
    for (const TextStream::Piece& piece : pieces) {
      text_ += piece.text;
      if (json_) continue;
      if (colour_ && piece.tag != shown_) {
        write(colour_end() + colour_of(static_cast<Mode>(piece.tag)));
        shown_ = piece.tag;
      }
      write(piece.text);
    }
  }

  static void write(const std::string& text) {
    const bool written =
        std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
    expect(written, "cannot write to standard output");
  }

  const tokenizer::Tokenizer& tokenizer_;
  TextStream stream_;
  std::string text_;
  std::vector<Piece> pieces_;
  bool json_, colour_;
  int shown_ = -1;  // the mode whose colour is on
};

// How fast the prompt was read and the tokens came.
struct Speed {
  Clock::time_point start = Clock::now(), first, last;
  int64_t tokens = 0;

  void count() {
    last = Clock::now();
    if (tokens++ == 0) first = last;
  }
  static double rate(int64_t tokens, Clock::duration time) {
    const double seconds = std::chrono::duration<double>(time).count();
    return seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
  }
  double prompt(int64_t prompt_tokens) const { return tokens > 0 ? rate(prompt_tokens, first - start) : 0; }
  double generation() const { return tokens > 1 ? rate(tokens - 1, last - first) : 0; }
};

Table to_table(const Options& options, const schedule::Schedule& schedule, const Completion& completion,
               const Output& output, int64_t prompt_tokens, const Speed& speed) {
  Array ids, logprobs, modes;
  for (const Token& token : completion.tokens) {
    ids.push_back(Value{token.id});
    logprobs.push_back(Value{token.logprob});
  }
  for (const auto& span : completion.modes) {
    Table row;
    row.set("begin", Value{span.begin});
    row.set("end", Value{span.end});
    row.set("mode", Value{std::string(schedule::mode_name(span.mode))});
    modes.push_back(Value{std::move(row)});
  }
  Table rates;
  rates.set("prompt", Value{speed.prompt(prompt_tokens)});
  rates.set("generation", Value{speed.generation()});
  Table table;
  table.set("model", Value{options.model});
  table.set("schedule", Value{schedule.text()});
  table.set("text", Value{output.text()});
  table.set("ids", Value{std::move(ids)});
  table.set("logprobs", Value{std::move(logprobs)});
  table.set("prompt_tokens", Value{prompt_tokens});
  table.set("modes", Value{std::move(modes)});
  table.set("pieces", Value{output.pieces()});
  table.set("finish_reason", Value{std::string(generation::finish_name(completion.finish))});
  table.set("tokens_per_second", Value{std::move(rates)});
  return table;
}

void generate(const Options& options) {
  // What can be wrong with the command is found before weights are read.
  generation::validate(options.sampling);
  if (options.max_tokens < 1) fail_usage("max-tokens is {}: expected at least 1", options.max_tokens);
  std::optional<schedule::Schedule> schedule;
  if (!options.schedule.empty()) schedule = schedule::Schedule::parse(options.schedule);
  const c10::ScalarType dtype = options.compute.resolve_dtype();
  const c10::Device device = options.compute.resolve_device();
  const std::string prompt = read_prompt(options);
  expect(std::filesystem::is_directory(options.model), "no such model directory: {}", options.model);
  const model::ModelConfig config = model::load_config(options.model);
  if (!schedule) {
    schedule = schedule::Schedule::parse(config.has_mode(Mode::attention) ? "attention" : "linear");
  }
  const auto tokenizer = load_tokenizer(options.model, config);
  Output output(options, *tokenizer);

  const std::vector<int32_t> ids = tokenizer->encode(prompt);
  expect(!ids.empty(), "the prompt is empty: it has no tokens");
  const auto prompt_tokens = static_cast<int64_t>(ids.size());
  // The end of a document ends the text.
  std::vector<std::vector<int64_t>> stops;
  if (const std::optional<int32_t> end = end_of_text(*tokenizer)) stops.push_back({*end});
  const generation::Request request{{ids.begin(), ids.end()}, *schedule,      options.max_tokens,
                                    options.sampling,         /*sequence=*/0, std::move(stops)};
  const schedule::ModeSpans modes = schedule->spans(prompt_tokens, prompt_tokens + options.max_tokens);

  const auto model = model::LanguageModel::load(options.model, dtype, device);
  const generation::Generator generator(model, tokenizer->vocabulary_size());
  watch_for_interrupt();
  if (!options.json && use_colour(options.color)) log("{}", colour_legend());
  if (options.echo || options.json) output.read_prompt(request.prompt, modes, options.echo);
  Speed speed;
  auto bar = std::make_unique<ProgressBar>(prompt_tokens, "prompt", ProgressOptions{.unit = "tok"});
  const auto completion = generator.generate(
      {request}, {.on_prompt = [&](int64_t tokens) { bar->advance(tokens); },
                  .on_token =
                      [&](size_t, const Token& token) {
                        speed.count();
                        // The text itself shows how far it is; without it a bar does.
                        if (speed.tokens == 1) {
                          bar.reset();
                          if (options.json) {
                            bar = std::make_unique<ProgressBar>(options.max_tokens, "generate",
                                                                ProgressOptions{.unit = "tok"});
                          }
                        }
                        if (bar) bar->advance();
                        return output.push(token.id, token.mode);
                      },
                  .cancelled = [] { return interrupted().load(); }})[0];
  bar.reset();
  output.finish();
  if (options.json) {
    const Table table = to_table(options, *schedule, completion, output, prompt_tokens, speed);
    fmt::print("{}\n", formats::to_json(table));
  } else {
    log("prompt: {} tokens, {:.0f} a second; generated: {} tokens, {:.1f} a second; finished by {}",
        prompt_tokens, speed.prompt(prompt_tokens), completion.tokens.size(), speed.generation(),
        generation::finish_name(completion.finish));
  }
  if (completion.finish == FinishReason::cancelled) throw Interrupted{};
}

}  // namespace

void add_generate(CLI::App& app) {
  CLI::App* command = app.add_subcommand("generate", "Continue a text, coloured by mixer");
  const auto options = std::make_shared<Options>();
  command->add_option("model", options->model, "a model directory")->required();
  CLI::Option_group* prompt = command->add_option_group("prompt");
  prompt->add_option("--prompt", options->prompt, "the text to continue");
  prompt->add_option("--prompt-file", options->prompt_file, "a file that holds it; - is standard input");
  prompt->require_option(1);
  command->add_option(
      "--schedule", options->schedule,
      "which mixer serves which token, the prompt being the known length (default: attention)");
  command->add_option("--max-tokens", options->max_tokens, "new tokens at most")->capture_default_str();
  command->add_option("--temperature", options->sampling.temperature, "0: the most likely token")
      ->capture_default_str();
  command->add_option("--top-k", options->sampling.top_k, "draw among the k most likely tokens; 0: all")
      ->capture_default_str();
  command
      ->add_option("--top-p", options->sampling.top_p,
                   "draw among the most likely tokens of this total share")
      ->capture_default_str();
  command->add_option("--stop", options->stops, "end before this text; may be repeated")
      ->allow_extra_args(false);
  command->add_option("--seed", options->sampling.seed, "of the draws")->capture_default_str();
  command->add_option("--color", options->color, "auto, always or never")
      ->check(CLI::IsMember({"auto", "always", "never"}))
      ->capture_default_str();
  command->add_flag("--echo", options->echo, "show the prompt too");
  command->add_flag("--json", options->json, "one object when done, instead of the text as it comes");
  options->compute.add_to(*command);
  command->callback([options] { generate(*options); });
}

}  // namespace oryx::cli
