// The data files of tasks: one JSON object a line.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/value.h"
#include "evaluation/task.h"

namespace oryx::evaluation {

// A file of options.data. Throws UsageError where that is not given.
std::string data_file(const std::string& task, const TaskOptions& options, const std::string& file);

// One line of a file, whose fields are read with errors that name the file and the line.
class Record {
 public:
  Record(Table table, std::string where) : table_(std::move(table)), where_(std::move(where)) {}

  const std::string& where() const { return where_; }  // "FILE:LINE"
  // A text that is not empty unless `may_be_empty`.
  std::string text(std::string_view key, bool may_be_empty = false) const;
  // At least `least` texts, none of them empty.
  std::vector<std::string> texts(std::string_view key, size_t least) const;
  // An index below `count`.
  int64_t index(std::string_view key, int64_t count) const;

 private:
  const Value& field(std::string_view key, std::string_view expected) const;

  Table table_;
  std::string where_;
};

// The first `limit` lines, blank ones aside. Throws Error for a missing file, a malformed line, and a file
// without any.
std::vector<Record> read_records(const std::string& path, std::optional<int64_t> limit);

}  // namespace oryx::evaluation
