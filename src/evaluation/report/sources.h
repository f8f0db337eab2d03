// What a report is made of: training runs, models, evaluations, switch curves and samples, as their files
// say.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "evaluation/curve.h"
#include "model/config.h"

namespace oryx::evaluation {

// Where something came from, and what the page calls it.
struct SourceName {
  std::string path;
  std::string label;
};

struct Points {
  std::vector<double> x, y;
};

// A run directory of `oryx train`: metrics.jsonl, and the newest checkpoint where there is one.
struct TrainingSource {
  SourceName name;
  std::optional<model::ModelConfig> config;
  Table recipe;            // of the checkpoint; empty without one
  std::string checkpoint;  // its directory, resolved; empty without one
  int64_t steps = 0;
  double tokens = 0, seconds = 0;
  // Over tokens.
  Points loss, learning_rate, gradient_norm, attention_share, tokens_per_second;
  std::vector<std::pair<std::string, Points>> validation;  // by mode
};

struct ModelSource {
  SourceName name;
  model::ModelConfig config;
};

struct MetricValue {
  std::string name;
  std::optional<double> value;  // none where the file holds null: no finite number
  std::optional<double> standard_error;
};

struct NeedleCell {
  int64_t length = 0, items = 0;
  double depth = 0, value = 0;
};

// Associative recall: the share of values that were right.
struct RecallCell {
  int64_t length = 0, pairs = 0, items = 0;
  double value = 0;
};

struct TaskScore {
  std::string task, group, main;
  int64_t items = 0;
  std::vector<MetricValue> metrics;
  std::vector<NeedleCell> cells;
  std::vector<RecallCell> recall;
  double tokens = 0, attention_tokens = 0, flops = 0, state_bytes = 0, seconds = 0, tokens_per_second = 0;

  const MetricValue* metric(std::string_view metric_name) const;  // null if absent
};

struct ScheduleScores {
  std::string schedule;
  std::vector<TaskScore> tasks;
  std::map<std::string, double> averages;  // by group

  const TaskScore* task(std::string_view task_name) const;  // null if absent
};

// An evaluation directory: results.json.
struct EvaluationSource {
  SourceName name;
  std::string model, device, dtype, command;
  std::vector<std::string> mixers;
  int64_t parameters = 0;
  std::optional<int64_t> limit;
  std::optional<model::ModelConfig> config;
  std::vector<ScheduleScores> runs;
};

struct ExcessRow {
  int64_t begin = 0, end = 0;
  double mean = 0, standard_error = 0;
};

struct SwitchRow {
  int64_t position = 0;
  std::string from, to;
  std::vector<ExcessRow> excess, bins;
};

struct CurveSchedule {
  CurveLine line;
  double perplexity = 0;
  std::vector<SwitchRow> switches;
};

// A curve directory: curve.json.
struct CurveSource {
  SourceName name;
  std::string model, data, dtype;
  int64_t windows = 0, length = 0, smooth = 0;
  std::vector<CurveSchedule> curves;
};

struct TextPiece {
  std::string text, mode;
  bool is_prompt = false;
};

struct Sample {
  std::string model, schedule;
  int64_t prompt_tokens = 0, tokens = 0;
  std::vector<TextPiece> pieces;
};

// What `oryx generate --json` printed: a file of one or many objects, one a line.
struct SampleSource {
  SourceName name;
  std::vector<Sample> samples;
};

struct Sources {
  std::vector<TrainingSource> training;
  std::vector<ModelSource> models;
  std::vector<EvaluationSource> evaluations;
  std::vector<CurveSource> curves;
  std::vector<SampleSource> samples;
};

// Each argument is PATH or LABEL=PATH: a directory of any kind above, or a file of samples. Without a label
// the page uses as much of the path's end as tells the arguments apart. Throws Error naming an argument that
// is none of these.
Sources read_sources(const std::vector<std::string>& arguments);

// The readers of each kind; read_sources chooses.
TrainingSource read_training(const SourceName& name);
EvaluationSource read_evaluation(const SourceName& name);
CurveSource read_curve(const SourceName& name);
SampleSource read_samples(const SourceName& name);

}  // namespace oryx::evaluation
