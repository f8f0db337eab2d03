#include "training/metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"

namespace oryx::training {

namespace {

using Json = nlohmann::ordered_json;

Json to_json(const TrainMetrics& m) {
  return {{"kind", "train"},
          {"step", m.step},
          {"tokens", m.tokens},
          {"loss", m.loss},
          {"learning_rate", m.learning_rate},
          {"gradient_norm", m.gradient_norm},
          {"attention_share", m.attention_share},
          {"tokens_per_second", m.tokens_per_second},
          {"seconds", m.seconds}};
}

Json to_json(const ValidationMetrics& m) {
  return {{"kind", "validation"}, {"step", m.step}, {"tokens", m.tokens}, {"loss", m.loss}};
}

TrainMetrics train_from_json(const Json& line) {
  TrainMetrics m;
  line.at("step").get_to(m.step);
  line.at("tokens").get_to(m.tokens);
  line.at("loss").get_to(m.loss);
  line.at("learning_rate").get_to(m.learning_rate);
  line.at("gradient_norm").get_to(m.gradient_norm);
  line.at("attention_share").get_to(m.attention_share);
  line.at("tokens_per_second").get_to(m.tokens_per_second);
  line.at("seconds").get_to(m.seconds);
  return m;
}

ValidationMetrics validation_from_json(const Json& line) {
  ValidationMetrics m;
  line.at("step").get_to(m.step);
  line.at("tokens").get_to(m.tokens);
  line.at("loss").get_to(m.loss);
  return m;
}

}  // namespace

Metrics::Metrics(const std::filesystem::path& directory, int64_t step) : path_(directory / "metrics.jsonl") {
  keep_lines_up_to(step);
  file_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  expect(file_ >= 0, "cannot write {}: {}", path_.string(), std::strerror(errno));
  events_.emplace(directory, step + 1);
}

Metrics::~Metrics() {
  if (file_ >= 0) close(file_);
}

void Metrics::keep_lines_up_to(int64_t step) {
  std::ifstream in(path_, std::ios::binary);
  if (!in) return;
  int64_t kept = 0;
  for (std::string text; std::getline(in, text) && !in.eof(); kept = in.tellg()) {
    const Json line = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    try {
      if (line.is_discarded() || line.at("step").get<int64_t>() > step) break;
      if (line.at("kind") == "train") last_train_ = train_from_json(line);
      if (line.at("kind") == "validation") last_validation_ = validation_from_json(line);
    } catch (const Json::exception&) {
      break;  // not written by this program: this line and what follows are dropped
    }
  }
  in.close();
  std::filesystem::resize_file(path_, kept);
}

void Metrics::record(const TrainMetrics& metrics) {
  last_train_ = metrics;
  write_line(to_json(metrics));
  const std::vector<std::pair<std::string, double>> scalars = {
      {"train/loss", metrics.loss},
      {"train/learning_rate", metrics.learning_rate},
      {"train/gradient_norm", metrics.gradient_norm},
      {"train/attention_share", metrics.attention_share},
      {"train/tokens_per_second", metrics.tokens_per_second},
  };
  events_->add_scalars(metrics.step, scalars);
}

void Metrics::record(const ValidationMetrics& metrics) {
  last_validation_ = metrics;
  write_line(to_json(metrics));
  std::vector<std::pair<std::string, double>> scalars;
  for (const auto& [mode, loss] : metrics.loss) scalars.emplace_back("validation/loss_" + mode, loss);
  events_->add_scalars(metrics.step, scalars);
}

void Metrics::write_line(const Json& line) {
  const std::string text = line.dump() + "\n";
  // One write a line: a killed process leaves whole lines, or a last one without its end, which is cut off.
  const ssize_t written = write(file_, text.data(), text.size());
  expect(written == static_cast<ssize_t>(text.size()), "cannot write {}: {}", path_.string(),
         written < 0 ? std::strerror(errno) : "disk full");
}

void Metrics::flush() {
  expect(fsync(file_) == 0, "cannot write {}: {}", path_.string(), std::strerror(errno));
}

}  // namespace oryx::training
