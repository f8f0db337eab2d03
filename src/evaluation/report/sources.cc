#include "evaluation/report/sources.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "base/error.h"
#include "model/weights.h"

namespace oryx::evaluation {

namespace {

namespace fs = std::filesystem;

// Names that say nothing by themselves: the folder above belongs to the label.
bool says_nothing(const std::string& name) {
  static const std::set<std::string> kNames = {"model",       "run",        "curve",  "latest",
                                               "checkpoints", "evaluation", "results"};
  return kNames.contains(name) || name.starts_with("step-");
}

// The last `count` parts of a path, without "latest" and what stands for the place itself.
std::string last_parts(const fs::path& path, size_t count) {
  std::vector<std::string> parts;
  for (const fs::path& part : path) {
    if (part.empty() || part == "." || part == "/") continue;
    parts.push_back(part.string());
  }
  if (parts.size() > 1 && parts.back() == "latest") parts.pop_back();
  if (parts.empty()) return path.string();
  size_t first = parts.size() - std::min(count, parts.size());
  while (first > 0 && says_nothing(parts[first])) --first;
  std::string label = parts[first];
  for (size_t i = first + 1; i < parts.size(); ++i) label += "/" + parts[i];
  return label;
}

// A curve and an evaluation of one place may share a label: they are told apart by what they are.
void set_labels(std::vector<SourceName>& names) {
  for (SourceName& name : names) {
    if (!name.label.empty()) continue;
    for (size_t count = 1; count <= 8; ++count) {
      name.label = last_parts(name.path, count);
      const bool is_unique = std::none_of(names.begin(), names.end(), [&](const SourceName& other) {
        return other.path != name.path && last_parts(other.path, count) == name.label;
      });
      if (is_unique) break;
    }
  }
}

SourceName parse_argument(const std::string& argument) {
  // A path may hold "=": one that exists is a path.
  if (!fs::exists(argument)) {
    const size_t equals = argument.find('=');
    if (equals != std::string::npos && equals > 0 && fs::exists(argument.substr(equals + 1))) {
      return {argument.substr(equals + 1), argument.substr(0, equals)};
    }
    fail("no such file or directory: {}", argument);
  }
  return {argument, ""};
}

void read_directory(const SourceName& name, Sources& sources) {
  const fs::path path = name.path;
  const auto holds = [&](const char* file) { return fs::is_regular_file(path / file); };
  bool known = false;
  if (holds("results.json")) {
    sources.evaluations.push_back(read_evaluation(name));
    known = true;
  }
  if (holds("curve.json")) {
    sources.curves.push_back(read_curve(name));
    known = true;
  }
  if (holds("metrics.jsonl")) {
    sources.training.push_back(read_training(name));
    known = true;
  }
  if (holds("config.json")) {
    sources.models.push_back({name, model::load_config(path)});
    known = true;
  }
  expect(known,
         "{} holds nothing to report: expected metrics.jsonl (a training run), config.json (a model), "
         "results.json "
         "(an evaluation) or curve.json (a switch curve)",
         name.path);
}

}  // namespace

const MetricValue* TaskScore::metric(std::string_view metric_name) const {
  const auto found = std::find_if(metrics.begin(), metrics.end(),
                                  [&](const auto& metric) { return metric.name == metric_name; });
  return found == metrics.end() ? nullptr : &*found;
}

const TaskScore* ScheduleScores::task(std::string_view task_name) const {
  const auto found =
      std::find_if(tasks.begin(), tasks.end(), [&](const auto& task) { return task.task == task_name; });
  return found == tasks.end() ? nullptr : &*found;
}

Sources read_sources(const std::vector<std::string>& arguments) {
  std::vector<SourceName> names;
  for (const std::string& argument : arguments) names.push_back(parse_argument(argument));
  set_labels(names);
  Sources sources;
  for (const SourceName& name : names) {
    if (fs::is_directory(name.path)) {
      read_directory(name, sources);
    } else {
      sources.samples.push_back(read_samples(name));
    }
  }
  return sources;
}

}  // namespace oryx::evaluation
