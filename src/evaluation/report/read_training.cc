#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "evaluation/report/json_fields.h"
#include "evaluation/report/sources.h"
#include "formats/file.h"
#include "formats/json.h"
#include "model/weights.h"

namespace oryx::evaluation {

namespace {

namespace fs = std::filesystem;

void add(Points& points, double x, std::optional<double> y) {
  if (!y || !std::isfinite(*y)) return;
  points.x.push_back(x);
  points.y.push_back(*y);
}

Points& validation_of(TrainingSource& run, const std::string& mode) {
  for (auto& [name, points] : run.validation) {
    if (name == mode) return points;
  }
  return run.validation.emplace_back(mode, Points{}).second;
}

void read_line(const JsonFields& line, TrainingSource& run) {
  const std::string kind = line.text("kind");
  const double tokens = line.number("tokens");
  run.steps = std::max(run.steps, line.integer("step"));
  run.tokens = std::max(run.tokens, tokens);
  if (kind == "validation") {
    const JsonFields loss = line.object("loss");
    for (const Entry& entry : loss.table().entries)
      add(validation_of(run, entry.key), tokens, loss.maybe_number(entry.key));
    return;
  }
  if (kind != "train") return;  // of a later version
  add(run.loss, tokens, line.maybe_number("loss"));
  add(run.learning_rate, tokens, line.maybe_number("learning_rate"));
  add(run.gradient_norm, tokens, line.maybe_number("gradient_norm"));
  add(run.attention_share, tokens, line.maybe_number("attention_share"));
  add(run.tokens_per_second, tokens, line.maybe_number("tokens_per_second"));
  run.seconds = std::max(run.seconds, line.maybe_number("seconds").value_or(0));
}

}  // namespace

TrainingSource read_training(const SourceName& name) {
  TrainingSource run;
  run.name = name;
  const std::string file = (fs::path(name.path) / "metrics.jsonl").string();
  const std::string text = formats::read_file(file);
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;  // a line that is being written, or that a killed run left
    const std::string where = fmt::format("{}:{}", file, ++number);
    const Value value = formats::parse_json(std::string_view(text).substr(begin, end - begin), where);
    expect(value.as<Table>() != nullptr, "{}: expected an object, got {}", where, value.text());
    read_line(JsonFields(*value.as<Table>(), where), run);
    begin = end + 1;
  }
  expect(!run.loss.x.empty() || !run.validation.empty(), "{} holds no step", file);
  const fs::path latest = fs::path(name.path) / "latest";
  if (fs::exists(latest / "config.json")) {
    run.checkpoint = fs::canonical(latest).string();
    run.config = model::load_config(latest);
  }
  if (fs::exists(latest / "training.json")) {
    const Table training = formats::read_json((latest / "training.json").string());
    run.recipe = section(training, "recipe");
  }
  return run;
}

}  // namespace oryx::evaluation
