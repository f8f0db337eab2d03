// A task of `oryx evaluate`: data read and encoded once, then scored under one schedule after the other.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/value.h"
#include "evaluation/schedule_form.h"
#include "model/language_model.h"
#include "tokenizer/tokenizer.h"

namespace oryx::evaluation {

struct Metric {
  std::string name;
  double value = 0;
  std::optional<double> standard_error = {};  // unknown for a single item
};

// What the items of a task cost, each sequence counted whole as if it ran alone.
struct TaskCost {
  int64_t sequences = 0;
  int64_t tokens = 0, attention_tokens = 0;
  double flops = 0;         // model.md §9
  int64_t state_bytes = 0;  // of the joint state of a sequence of mean length
};

struct TaskResult {
  int64_t items = 0;
  std::vector<Metric> metrics = {};
  std::string main;  // the metric that averages use
  TaskCost cost = {};
  int64_t tokens_run = 0;  // that the model read or wrote: shared ones once, no padding
  // Where tokens are scored: those computed, padding included, and those whose log-likelihood was asked for.
  std::optional<int64_t> tokens_computed = {}, tokens_scored = {};
  int64_t items_cut = 0;            // whose context was shortened
  std::vector<Table> cells = {};    // parts of the task with a value of their own
  std::vector<Table> records = {};  // one an item: all that its score needs
};

// What a task runs on.
struct Runner {
  const model::LanguageModel& model;
  const tokenizer::Tokenizer& tokenizer;
  int64_t batch_tokens = 4096;
  std::function<void(int64_t items)> on_items = {};
  std::function<bool()> cancelled = {};
};

class Task {
 public:
  Task(std::string name, std::string group) : name_(std::move(name)), group_(std::move(group)) {}
  virtual ~Task() = default;

  const std::string& name() const { return name_; }
  // "language", "retrieval", "needle" or "recall".
  const std::string& group() const { return group_; }
  // Where FROM->TO splits a sequence of this task unless the user says: "query" or a percentage.
  std::string default_split() const { return group_ == "needle" || group_ == "recall" ? "query" : "97.5%"; }

  virtual int64_t items() const = 0;
  // Of progress: what Runner::on_items counts.
  virtual int64_t steps() const { return items(); }
  virtual bool has_query() const { return true; }
  // Nothing when cancelled.
  virtual std::optional<TaskResult> run(const ScheduleForm& schedule, const Runner& runner) const = 0;

 private:
  std::string name_, group_;
};

struct TaskOptions {
  std::string data;                   // directory of the data files
  std::optional<int64_t> limit = {};  // items at most, the first ones
  uint64_t seed = 0;                  // of what is made on the fly
  int64_t max_length = 2048;          // tokens that one forward pass of a scored sequence reads
  bool refuse_long = false;           // longer ones are an error, not cut on the left
  int64_t context_tokens = 2000;      // of the prompt of retrieval tasks
  int64_t max_new_tokens = 48;        // of an answer
  std::map<std::string, std::string> retrieval = {};  // more retrieval tasks: name → file
  std::string essay;                                  // text of essay haystacks; empty: DATA/essay.txt
  std::vector<int64_t> needle_lengths = {2048};
  std::vector<double> needle_depths = {0, 25, 50, 75, 100};  // per cent of the haystack before the needle
  int64_t needle_samples = 500;                              // a length, spread over the depths
  int64_t mqar_length = 256, mqar_samples = 500;
  std::vector<int64_t> mqar_pairs = {4, 8, 16, 32, 64};
};

// The tasks that have names of their own, in the order of reports; group names and "all" stand for several.
std::vector<std::string> task_names();
// Names of tasks and of groups → names of tasks, each once. A path that ends with .jsonl becomes a retrieval
// task of that file. Throws UsageError for an unknown name, with the nearest valid one.
std::vector<std::string> expand_tasks(const std::vector<std::string>& names, TaskOptions& options);
// Adds a retrieval task of a file. Throws UsageError where another task has its name.
void add_retrieval(const std::string& name, const std::string& file, TaskOptions& options);
// Throws UsageError naming the option that is out of range.
void validate(const TaskOptions& options);

// Reads or makes the task's items. Throws Error for a file that is missing, has an item without a field it
// needs, or one of another type.
std::unique_ptr<const Task> make_task(const std::string& name, const TaskOptions& options,
                                      const tokenizer::Tokenizer& tokenizer);

}  // namespace oryx::evaluation
