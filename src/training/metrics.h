// What a run records of itself: metrics.jsonl, one JSON object a line, and the same numbers as TensorBoard
// charts.
//
//   {"kind": "train", "step": n, "tokens": …, "loss": …, "learning_rate": …, "gradient_norm": …,
//    "attention_share": …, "tokens_per_second": …, "seconds": …}           after the n-th update, n = 1 … S
//   {"kind": "validation", "step": n, "tokens": …, "loss": {"attention": …, "linear": …}}   after n updates
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "training/event_file.h"

namespace oryx::training {

struct TrainMetrics {
  int64_t step = 0;    // updates made, this one included
  int64_t tokens = 0;  // tokens seen
  double loss = 0;     // mean over the tokens of the global batch, before the update
  double learning_rate = 0;
  double gradient_norm = 0;      // before clipping
  double attention_share = 0;    // of the batch's tokens
  double tokens_per_second = 0;  // of this step, validation and checkpoints left out
  double seconds = 0;            // in training so far, over all resumptions
};

struct ValidationMetrics {
  int64_t step = 0;
  int64_t tokens = 0;
  std::map<std::string, double> loss;  // by mode: "attention", "linear", "mixed"
};

class Metrics {
 public:
  // Continues the records of `directory` behind `step` updates: lines about later steps come from a run that
  // was interrupted, and are cut off. A step of −1 starts afresh.
  Metrics(const std::filesystem::path& directory, int64_t step);
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;
  ~Metrics();

  void record(const TrainMetrics& metrics);
  void record(const ValidationMetrics& metrics);

  // Makes every record so far survive a crash of the machine; a checkpoint that is published afterwards never
  // outlives the lines before it.
  void flush();

  // The newest records of each kind, from before an interruption too.
  const std::optional<TrainMetrics>& last_train() const { return last_train_; }
  const std::optional<ValidationMetrics>& last_validation() const { return last_validation_; }

 private:
  void keep_lines_up_to(int64_t step);
  void write_line(const nlohmann::ordered_json& line);

  std::filesystem::path path_;
  int file_ = -1;
  std::optional<EventFile> events_;
  std::optional<TrainMetrics> last_train_;
  std::optional<ValidationMetrics> last_validation_;
};

}  // namespace oryx::training
