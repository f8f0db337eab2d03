// An evaluation directory: results.json and items/TASK.RUN.jsonl (docs/evaluation.md). It is written after
// every task under every schedule, so an interrupted command that is given again goes on where it stopped.
#pragma once

#include <filesystem>
#include <string>

#include "base/value.h"
#include "evaluation/task.h"

namespace oryx::evaluation {

class ResultStore {
 public:
  // `header`: the top of results.json: model, device, dtype, seed, limit, settings, command. Reads what the
  // directory holds already; writes nothing. Throws Error when that is of another model or made with other
  // settings, naming the first difference.
  ResultStore(std::filesystem::path directory, Table header);

  bool has(const std::string& schedule, const std::string& task) const;

  // Writes items and results.json, each whole or not at all; makes the directory.
  void add(const std::string& schedule, const Task& task, const std::string& task_schedule,
           const TaskResult& result, double seconds);

  // results.json.
  const Table& table() const { return table_; }

 private:
  Array& runs();
  const Array& runs() const;

  std::filesystem::path directory_;
  std::string command_;  // this one, which results.json names once it has added to it
  Table table_;
};

// The averages that the tasks of a run allow: "language" of the seven tasks that the paper averages,
// "retrieval" of squad and drop, "needle" of the three single needles; each of main metrics, and only where
// all are there.
Table averages_of(const Table& tasks);

}  // namespace oryx::evaluation
