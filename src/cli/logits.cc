// oryx logits: tokens in, logits out, whole or in pieces that carry the joint state.
//
// Positions are absolute: after --load-state the tokens go on where the state stops, and the schedule speaks
// of the whole sequence, whose known length is the state's position plus these tokens.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/progress.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "formats/file.h"
#include "formats/safetensors.h"
#include "model/language_model.h"
#include "schedule/schedule.h"

namespace oryx::cli {

namespace {

struct Options {
  std::string model, tokens, schedule, output, save_state, load_state;
  std::optional<int64_t> split;
  uint64_t seed = 0;
  ComputeOptions compute;
};

constexpr int64_t kRowsAtOnce = 1024;  // of logits: a whole sequence of them may not fit in memory

// int64 [batch, time] on the CPU.
at::Tensor read_tokens(const std::string& path) {
  const formats::SafetensorsFile file(path);
  expect(file.contains("tokens"), "{}: expected a tensor named tokens", path);
  const at::Tensor tokens = file.tensor("tokens");
  expect(tokens.scalar_type() == at::kInt || tokens.scalar_type() == at::kLong,
         "{}: expected tokens of type int32 or int64, got {}", path, c10::toString(tokens.scalar_type()));
  expect(tokens.dim() == 2, "{}: expected tokens [batch, time], got {} dimensions", path, tokens.dim());
  expect(tokens.numel() > 0, "{}: tokens is empty: [{}, {}]", path, tokens.size(0), tokens.size(1));
  return tokens.to(at::kLong);
}

model::JointState starting_state(const Options& options, const model::LanguageModel& model, int64_t batch) {
  if (options.load_state.empty()) return model.empty_state(batch);
  auto state = model::JointState::load(options.load_state, model.config(), model.dtype(), model.device());
  expect(state.batch() == batch, "{} holds the state of {} sequences, but {} has {}", options.load_state,
         state.batch(), options.tokens, batch);
  return state;
}

// The hidden states [batch · time, width] of all tokens; advances the state.
at::Tensor hidden_states(const model::LanguageModel& model, const at::Tensor& tokens,
                         const schedule::ModeSpans& spans, int64_t piece, model::JointState& state) {
  const int64_t batch = tokens.size(0), time = tokens.size(1), start = state.position();
  ProgressBar bar(time, "logits", {.unit = "tok"});
  std::vector<at::Tensor> pieces;
  for (int64_t begin = 0; begin < time; begin += piece) {
    if (interrupted()) throw Interrupted{};
    const int64_t end = std::min(time, begin + piece);
    const at::Tensor part = tokens.slice(1, begin, end).contiguous().to(model.device());
    const at::Tensor hidden = model.hidden(part, {schedule::cut(spans, start + begin, start + end)}, &state);
    pieces.push_back(hidden.view({batch, end - begin, -1}));
    bar.advance(end - begin);
  }
  return at::cat(pieces, 1).flatten(0, 1);
}

void write_logits(const model::LanguageModel& model, const at::Tensor& hidden, int64_t batch,
                  formats::AtomicFile& file) {
  const int64_t rows = hidden.size(0), vocabulary = model.config().vocabulary;
  const auto bytes = static_cast<uint64_t>(rows * vocabulary) * c10::elementSize(model.dtype());
  file.write(formats::safetensors_header(
      {{"logits", {model.dtype(), {batch, rows / batch, vocabulary}, 0, bytes}}}, {}));
  for (int64_t begin = 0; begin < rows; begin += kRowsAtOnce) {
    if (interrupted()) throw Interrupted{};
    const at::Tensor logits =
        model.logits(hidden.slice(0, begin, std::min(rows, begin + kRowsAtOnce))).cpu().contiguous();
    file.write(logits.const_data_ptr(), logits.nbytes());
  }
}

void logits(const Options& options) {
  const auto schedule = schedule::Schedule::parse(options.schedule);
  if (options.split && *options.split < 1) fail_usage("split is {}: expected at least 1", *options.split);
  const c10::ScalarType dtype = options.compute.resolve_dtype();
  const c10::Device device = options.compute.resolve_device();
  expect_parent_directory(options.output);
  if (!options.save_state.empty()) expect_parent_directory(options.save_state);
  const at::Tensor tokens = read_tokens(options.tokens);
  expect(std::filesystem::is_directory(options.model), "no such model directory: {}", options.model);

  const c10::NoGradGuard no_grad;
  const auto model = model::LanguageModel::load(options.model, dtype, device);
  auto state = starting_state(options, model, tokens.size(0));
  const int64_t length = state.position() + tokens.size(1);
  const schedule::ModeSpans spans = schedule.spans(length, length);
  watch_for_interrupt();
  const at::Tensor hidden =
      hidden_states(model, tokens, spans, options.split.value_or(tokens.size(1)), state);
  // Both files or neither: this one appears last.
  formats::AtomicFile file(options.output);
  write_logits(model, hidden, tokens.size(0), file);
  if (!options.save_state.empty()) state.save(options.save_state, model.config());
  file.commit();
}

}  // namespace

void add_logits(CLI::App& app) {
  CLI::App* command = app.add_subcommand("logits", "Write the logits of given tokens");
  const auto options = std::make_shared<Options>();
  command->add_option("model", options->model, "a model directory")->required();
  command
      ->add_option("--tokens", options->tokens, "safetensors file with tokens [batch, time], int32 or int64")
      ->required();
  command->add_option("--schedule", options->schedule, "which mixer serves which token")->required();
  command->add_option("--output", options->output, "safetensors file for logits [batch, time, vocabulary]")
      ->required();
  command->add_option("--split", options->split, "feed pieces of this many tokens, carrying the state");
  command->add_option("--save-state", options->save_state, "write the joint state after the last token");
  command->add_option("--load-state", options->load_state, "go on from a joint state");
  command->add_option("--seed", options->seed, "accepted for uniformity: nothing is drawn here");
  options->compute.add_to(*command);
  command->callback([options] { logits(*options); });
}

}  // namespace oryx::cli
