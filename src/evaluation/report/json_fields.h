// An object of a JSON file, for readers that name the file, the place and the key of what is wrong.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/value.h"

namespace oryx::evaluation {

class JsonFields {
 public:
  // `where` begins messages: "runs/a/results.json" or "runs/a/results.json: runs[0]". The table must outlive
  // this.
  JsonFields(const Table& table, std::string where) : table_(&table), where_(std::move(where)) {}

  // Null where the key is absent or holds null.
  const Value* find(std::string_view key) const;

  // Each throws Error where the key holds another type, and, without a fallback, where it is absent.
  std::string text(std::string_view key) const;
  std::string text(std::string_view key, std::string fallback) const;
  int64_t integer(std::string_view key) const;
  int64_t integer(std::string_view key, int64_t fallback) const;
  double number(std::string_view key) const;
  std::optional<double> maybe_number(std::string_view key) const;  // absent or null: nothing
  bool flag(std::string_view key, bool fallback) const;
  JsonFields object(std::string_view key) const;
  std::vector<JsonFields> objects(std::string_view key) const;  // a list of objects; absent: empty
  std::vector<double> numbers(std::string_view key) const;      // a list of numbers; absent: empty
  std::vector<std::string> texts(std::string_view key) const;   // a list of strings; absent: empty

  const Table& table() const { return *table_; }
  const std::string& where() const { return where_; }

 private:
  template <class T>
  const T& get(std::string_view key, const char* wanted) const;
  const Array* list(std::string_view key) const;
  [[noreturn]] void fail_type(std::string_view key, const Value& value, const char* wanted) const;

  const Table* table_;
  std::string where_;
};

}  // namespace oryx::evaluation
