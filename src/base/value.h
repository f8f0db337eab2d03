// A tree of plain values between a file format (formats/toml.h, formats/json.h) and a config struct
// (base/config_fields.h). Every value remembers where it was written, for error messages.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace oryx {

struct Origin {
  std::shared_ptr<const std::string> source;  // a file name or "the command line"; null if unknown
  int64_t line = 0;                           // from 1; 0 where the source has no lines

  // " in FILE:12", " in FILE", or "" if unknown: to be appended to a message.
  std::string in() const;
};

struct Value;
struct Entry;
using Array = std::vector<Value>;

// Keys in the order they were written, each once.
struct Table {
  std::vector<Entry> entries;
  Origin origin;

  const Value* find(std::string_view key) const;  // null if absent
  Value* find(std::string_view key);
  void set(std::string key, Value value);  // replaces the value of a key that exists
  bool empty() const;
};

struct Value {
  using Data = std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Table>;

  Data data;
  Origin origin;

  // Out of line: a tree's destructor inlined everywhere is large, and GCC 12 warns of it without reason.
  Value();
  Value(Data data, Origin origin = {});
  Value(const Value&);
  Value(Value&&) noexcept;
  Value& operator=(const Value&);
  Value& operator=(Value&&) noexcept;
  ~Value();

  template <class T>
  const T* as() const {
    return std::get_if<T>(&data);
  }

  // As TOML would write it, cut after about 60 characters: for error messages.
  std::string text() const;
};

struct Entry {
  std::string key;
  Value value;
};

// Shortest decimal text that reads back as the same number and as no integer ("1.0", "1e-05", "inf").
std::string float_text(double number);

// "text" with the escapes that TOML basic strings and JSON share.
std::string quote(std::string_view text);

// Sets root's value at a dotted path ("model.attention.query_activation"), making tables on the way.
// Throws Error where the path runs through a value that is no table.
void set_path(Table& root, std::string_view path, Value value);

// `over` laid on `under`: tables join key by key, anything else replaces.
Table overlay(Table under, const Table& over);

// One level with dotted keys from nested tables. Throws Error for a key given twice (as a.b and as "a.b").
Table flatten(const Table& table);

// The table under `name`, or an empty one. Throws Error where `name` holds something else.
const Table& section(const Table& root, std::string_view name);

// Throws Error naming the nearest valid section for anything at the top that is none of `sections`.
void expect_sections(const Table& root, const std::vector<std::string>& sections);

}  // namespace oryx
