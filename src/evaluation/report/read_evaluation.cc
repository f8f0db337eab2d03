#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "evaluation/report/json_fields.h"
#include "evaluation/report/sources.h"
#include "formats/json.h"

namespace oryx::evaluation {

namespace {

namespace fs = std::filesystem;

TaskScore read_task(const std::string& task_name, const JsonFields& fields) {
  TaskScore task;
  task.task = task_name;
  task.group = fields.text("group");
  task.main = fields.text("main");
  task.items = fields.integer("items");
  const JsonFields metrics = fields.object("metrics");
  for (const Entry& entry : metrics.table().entries) {
    const JsonFields metric = metrics.object(entry.key);
    task.metrics.push_back({entry.key, metric.maybe_number("value"), metric.maybe_number("standard_error")});
  }
  expect(task.metric(task.main) != nullptr, "{}: main is {}, which is none of metrics", fields.where(),
         task.main);
  for (const JsonFields& cell : fields.objects("cells")) {
    if (cell.find("length") && cell.find("pairs")) {
      task.recall.push_back(
          {cell.integer("length"), cell.integer("pairs"), cell.integer("items", 0), cell.number("value")});
      expect(task.recall.back().pairs >= 1, "{}: pairs is {}, expected at least 1", cell.where(),
             task.recall.back().pairs);
    }
    // Other tasks may have cells of another kind: only these make a heatmap.
    if (!cell.find("length") || !cell.find("depth")) continue;
    task.cells.push_back(
        {cell.integer("length"), cell.integer("items", 0), cell.number("depth"), cell.number("value")});
  }
  task.tokens = fields.maybe_number("tokens").value_or(0);
  task.attention_tokens = fields.maybe_number("attention_tokens").value_or(0);
  task.flops = fields.maybe_number("flops").value_or(0);
  task.state_bytes = fields.maybe_number("state_bytes").value_or(0);
  task.seconds = fields.maybe_number("seconds").value_or(0);
  // Where shared contexts are read once, fewer tokens run than the items hold.
  const double rate = task.seconds > 0 ? task.tokens / task.seconds : 0;
  task.tokens_per_second = fields.maybe_number("tokens_per_second").value_or(rate);
  return task;
}

}  // namespace

EvaluationSource read_evaluation(const SourceName& name) {
  const std::string file = (fs::path(name.path) / "results.json").string();
  const Table table = formats::read_json(file);
  const JsonFields fields(table, file);
  expect(fields.text("format", "") == "oryx.evaluation", "{} is not the result of an evaluation", file);
  expect(fields.integer("version") == 1, "{}: version is {}, this program reads 1", file,
         fields.integer("version"));
  EvaluationSource source;
  source.name = name;
  const JsonFields model = fields.object("model");
  source.model = model.text("name", model.text("directory", ""));
  source.mixers = model.texts("mixers");
  source.parameters = model.integer("parameters", 0);
  if (model.find("config")) source.config = model::ModelConfig::read(model.object("config").table(), "");
  source.device = fields.text("device", "");
  source.dtype = fields.text("dtype", "");
  source.command = fields.text("command", "");
  if (fields.find("limit")) source.limit = fields.integer("limit");
  for (const JsonFields& run : fields.objects("runs")) {
    ScheduleScores scores;
    scores.schedule = run.text("schedule");
    const JsonFields tasks = run.object("tasks");
    for (const Entry& entry : tasks.table().entries) {
      scores.tasks.push_back(read_task(entry.key, tasks.object(entry.key)));
    }
    if (run.find("averages")) {
      const JsonFields averages = run.object("averages");
      for (const Entry& entry : averages.table().entries) {
        if (const auto value = averages.maybe_number(entry.key)) scores.averages[entry.key] = *value;
      }
    }
    source.runs.push_back(std::move(scores));
  }
  return source;
}

}  // namespace oryx::evaluation
