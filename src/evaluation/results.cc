#include "evaluation/results.h"

#include <cmath>
#include <optional>
#include <utility>

#include "base/error.h"
#include "formats/file.h"
#include "formats/json.h"

namespace oryx::evaluation {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kFormat = "oryx.evaluation";

// What must be the same for two results to stand side by side.
constexpr const char* kIdentity[] = {"model", "device", "dtype", "seed", "limit", "settings"};

// JSON has no infinity: null stands for it.
Value number(double value) { return std::isfinite(value) ? Value{value} : Value{nullptr}; }

// Of nested tables, so that the message names one key.
void expect_equal(const std::string& file, const std::string& key, const Value* stored, const Value* now) {
  if (stored && now && stored->as<Table>() && now->as<Table>()) {
    for (const Entry& entry : now->as<Table>()->entries) {
      if (entry.key == "retrieval") continue;  // compared file by file
      expect_equal(file, key + "." + entry.key, stored->as<Table>()->find(entry.key), &entry.value);
    }
    return;
  }
  const std::string before = stored ? formats::to_json(*stored) : "nothing";
  const std::string after = now ? formats::to_json(*now) : "nothing";
  expect(before == after, "{} was made with {} {}, not {}: name another --output, or remove it", file, key,
         before, after);
}

Table metrics_table(const std::vector<Metric>& metrics) {
  Table table;
  for (const Metric& metric : metrics) {
    Table entry;
    entry.set("value", number(metric.value));
    entry.set("standard_error", metric.standard_error ? number(*metric.standard_error) : Value{nullptr});
    table.set(metric.name, Value{std::move(entry)});
  }
  return table;
}

Table task_table(const Task& task, const std::string& schedule, const TaskResult& result, double seconds,
                 const std::string& items_file) {
  const TaskCost& cost = result.cost;
  Table table;
  table.set("items", Value{result.items});
  table.set("metrics", Value{metrics_table(result.metrics)});
  table.set("main", Value{result.main});
  table.set("group", Value{task.group()});
  table.set("schedule", Value{schedule});
  table.set("items_cut", Value{result.items_cut});
  table.set("sequences", Value{cost.sequences});
  table.set("tokens", Value{cost.tokens});
  table.set("attention_tokens", Value{cost.attention_tokens});
  table.set("attention_share",
            Value{static_cast<double>(cost.attention_tokens) / static_cast<double>(cost.tokens)});
  table.set("flops", Value{cost.flops});
  table.set("state_bytes", Value{cost.state_bytes});
  table.set("seconds", Value{seconds});
  table.set("tokens_run", Value{result.tokens_run});
  if (result.tokens_computed) table.set("tokens_computed", Value{*result.tokens_computed});
  if (result.tokens_scored) table.set("tokens_scored", Value{*result.tokens_scored});
  table.set("tokens_per_second", Value{static_cast<double>(result.tokens_run) / std::max(seconds, 1e-9)});
  table.set("items_file", Value{items_file});
  if (!result.cells.empty()) {
    Array cells;
    for (const Table& cell : result.cells) cells.push_back(Value{cell});
    table.set("cells", Value{std::move(cells)});
  }
  return table;
}

const Table* find_run(const Array& runs, const std::string& schedule) {
  for (const Value& run : runs) {
    const Value* text = run.as<Table>() ? run.as<Table>()->find("schedule") : nullptr;
    if (text && text->as<std::string>() && *text->as<std::string>() == schedule) return run.as<Table>();
  }
  return nullptr;
}

// The value of a task's main metric.
std::optional<double> main_value(const Table& task) {
  const Table& metrics = section(task, "metrics");
  const Value* main = task.find("main");
  if (!main || !main->as<std::string>()) return std::nullopt;
  const Value* value = section(metrics, *main->as<std::string>()).find("value");
  if (!value || !value->as<double>()) return std::nullopt;
  return *value->as<double>();
}

}  // namespace

ResultStore::ResultStore(fs::path directory, Table header)
    : directory_(std::move(directory)), table_(std::move(header)) {
  Table start;
  start.set("format", Value{std::string(kFormat)});
  start.set("version", Value{int64_t{1}});
  table_ = overlay(std::move(start), table_);
  table_.set("runs", Value{Array{}});
  if (const Value* text = table_.find("command")) command_ = *text->as<std::string>();
  const std::string file = (directory_ / "results.json").string();
  if (!fs::exists(file)) return;
  Table stored = formats::read_json(file);
  const Value* format = stored.find("format");
  expect(format && format->as<std::string>() && *format->as<std::string>() == kFormat,
         "{} is not the result of an evaluation", file);
  // Files of retrieval tasks may come to others.
  Table& settings = std::get<Table>(table_.find("settings")->data);
  Table files = section(section(stored, "settings"), "retrieval");
  for (const Entry& entry : section(settings, "retrieval").entries) {
    if (const Value* before = files.find(entry.key)) {
      expect_equal(file, "retrieval " + entry.key, before, &entry.value);
    }
    files.set(entry.key, entry.value);
  }
  settings.set("retrieval", Value{files});
  for (const char* key : kIdentity) expect_equal(file, key, stored.find(key), table_.find(key));
  Value* runs = stored.find("runs");
  expect(runs && runs->as<Array>(), "{}: expected a list of runs", file);
  table_.set("runs", std::move(*runs));
  if (const Value* before = stored.find("command")) table_.set("command", *before);
}

Array& ResultStore::runs() { return std::get<Array>(table_.find("runs")->data); }
const Array& ResultStore::runs() const { return *table_.find("runs")->as<Array>(); }

bool ResultStore::has(const std::string& schedule, const std::string& task) const {
  const Table* run = find_run(runs(), schedule);
  return run && section(*run, "tasks").find(task) != nullptr;
}

void ResultStore::add(const std::string& schedule, const Task& task, const std::string& task_schedule,
                      const TaskResult& result, double seconds) {
  if (!find_run(runs(), schedule)) {
    Table run;
    run.set("schedule", Value{schedule});
    run.set("tasks", Value{Table{}});
    runs().push_back(Value{std::move(run)});
  }
  for (size_t n = 0; n < runs().size(); ++n) {
    Table& run = std::get<Table>(runs()[n].data);
    if (&run != find_run(runs(), schedule)) continue;
    const std::string items_file = fmt::format("items/{}.{}.jsonl", task.name(), n);
    std::string items;
    for (const Table& record : result.records) items += formats::to_json(record) + "\n";
    fs::create_directories(directory_ / "items");
    formats::write_file_atomic((directory_ / items_file).string(), items);
    Table& tasks = std::get<Table>(run.find("tasks")->data);
    tasks.set(task.name(), Value{task_table(task, task_schedule, result, seconds, items_file)});
    run.set("averages", Value{averages_of(tasks)});
  }
  table_.set("command", Value{command_});
  formats::write_file_atomic((directory_ / "results.json").string(), formats::to_json(table_, 1) + "\n");
}

Table averages_of(const Table& tasks) {
  static const std::pair<const char*, std::vector<const char*>> kAverages[] = {
      {"language", {"lambada", "hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa"}},
      {"retrieval", {"squad", "drop"}},
      {"needle", {"needle_single_1", "needle_single_2", "needle_single_3"}}};
  Table averages;
  for (const auto& [name, parts] : kAverages) {
    double sum = 0;
    bool complete = true;
    for (const char* part : parts) {
      const Value* task = tasks.find(part);
      const std::optional<double> value =
          task && task->as<Table>() ? main_value(*task->as<Table>()) : std::nullopt;
      complete = complete && value;
      sum += value.value_or(0);
    }
    if (complete) averages.set(name, Value{sum / static_cast<double>(parts.size())});
  }
  return averages;
}

}  // namespace oryx::evaluation
