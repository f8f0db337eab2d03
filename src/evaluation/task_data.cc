#include "evaluation/task_data.h"

#include <filesystem>

#include "base/error.h"
#include "formats/file.h"
#include "formats/json.h"

namespace oryx::evaluation {

std::string data_file(const std::string& task, const TaskOptions& options, const std::string& file) {
  if (options.data.empty()) fail_usage("task {} reads {}: pass its directory as --data", task, file);
  return (std::filesystem::path(options.data) / file).string();
}

const Value& Record::field(std::string_view key, std::string_view expected) const {
  const Value* value = table_.find(key);
  expect(value != nullptr, "{}: the field \"{}\" is missing: expected {}", where_, key, expected);
  return *value;
}

std::string Record::text(std::string_view key, bool may_be_empty) const {
  const Value& value = field(key, "a text");
  const auto* text = value.as<std::string>();
  expect(text != nullptr, "{}: expected \"{}\" to be a text, got {}", where_, key, value.text());
  expect(may_be_empty || !text->empty(), "{}: \"{}\" is empty", where_, key);
  return *text;
}

std::vector<std::string> Record::texts(std::string_view key, size_t least) const {
  const Value& value = field(key, "a list of texts");
  const auto* array = value.as<Array>();
  expect(array != nullptr, "{}: expected \"{}\" to be a list of texts, got {}", where_, key, value.text());
  expect(array->size() >= least, "{}: expected \"{}\" to hold at least {}, got {}", where_, key, least,
         array->size());
  std::vector<std::string> texts;
  for (const Value& entry : *array) {
    const auto* text = entry.as<std::string>();
    expect(text != nullptr && !text->empty(), "{}: expected texts that are not empty in \"{}\", got {}",
           where_, key, entry.text());
    texts.push_back(*text);
  }
  return texts;
}

int64_t Record::index(std::string_view key, int64_t count) const {
  const Value& value = field(key, "the number of a choice");
  const auto* number = value.as<int64_t>();
  expect(number != nullptr && *number >= 0 && *number < count,
         "{}: expected \"{}\" to be a number from 0 to {}, got {}", where_, key, count - 1, value.text());
  return *number;
}

std::vector<Record> read_records(const std::string& path, std::optional<int64_t> limit) {
  expect(std::filesystem::is_regular_file(path), "no such task file: {}", path);
  const std::string text = formats::read_file(path);
  std::vector<Record> records;
  std::string_view rest = text;
  for (int64_t line = 1; !rest.empty(); ++line) {
    if (limit && static_cast<int64_t>(records.size()) >= *limit) break;
    const size_t end = rest.find('\n');
    const std::string_view content = rest.substr(0, end);
    rest.remove_prefix(end == std::string_view::npos ? rest.size() : end + 1);
    if (content.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    std::string where = fmt::format("{}:{}", path, line);
    Value value = formats::parse_json(content, where);
    auto* table = std::get_if<Table>(&value.data);
    expect(table != nullptr, "{}: expected an object, got {}", where, value.text());
    records.emplace_back(std::move(*table), std::move(where));
  }
  expect(!records.empty(), "{} holds no items", path);
  return records;
}

}  // namespace oryx::evaluation
