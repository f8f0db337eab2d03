#include "evaluation/report/json_fields.h"

#include "base/error.h"

namespace oryx::evaluation {

const Value* JsonFields::find(std::string_view key) const {
  const Value* value = table_->find(key);
  return value && !value->as<std::nullptr_t>() ? value : nullptr;
}

void JsonFields::fail_type(std::string_view key, const Value& value, const char* wanted) const {
  fail("{}: {} is {}, expected {}", where_, key, value.text(), wanted);
}

template <class T>
const T& JsonFields::get(std::string_view key, const char* wanted) const {
  const Value* value = find(key);
  expect(value != nullptr, "{}: {} is missing, expected {}", where_, key, wanted);
  const T* typed = value->as<T>();
  if (!typed) fail_type(key, *value, wanted);
  return *typed;
}

std::string JsonFields::text(std::string_view key) const { return get<std::string>(key, "a string"); }
std::string JsonFields::text(std::string_view key, std::string fallback) const {
  return find(key) ? text(key) : fallback;
}

int64_t JsonFields::integer(std::string_view key) const { return get<int64_t>(key, "an integer"); }
int64_t JsonFields::integer(std::string_view key, int64_t fallback) const {
  return find(key) ? integer(key) : fallback;
}

double JsonFields::number(std::string_view key) const {
  const std::optional<double> value = maybe_number(key);
  expect(value.has_value(), "{}: {} is missing, expected a number", where_, key);
  return *value;
}

std::optional<double> JsonFields::maybe_number(std::string_view key) const {
  const Value* value = find(key);
  if (!value) return std::nullopt;
  if (const int64_t* whole = value->as<int64_t>()) return static_cast<double>(*whole);
  const double* real = value->as<double>();
  if (!real) fail_type(key, *value, "a number");
  return *real;
}

bool JsonFields::flag(std::string_view key, bool fallback) const {
  return find(key) ? get<bool>(key, "true or false") : fallback;
}

JsonFields JsonFields::object(std::string_view key) const {
  return {get<Table>(key, "an object"), fmt::format("{}: {}", where_, key)};
}

const Array* JsonFields::list(std::string_view key) const {
  return find(key) ? &get<Array>(key, "a list") : nullptr;
}

std::vector<JsonFields> JsonFields::objects(std::string_view key) const {
  std::vector<JsonFields> result;
  const Array* items = list(key);
  for (size_t i = 0; items && i < items->size(); ++i) {
    const Table* table = (*items)[i].as<Table>();
    if (!table) fail_type(fmt::format("{}[{}]", key, i), (*items)[i], "an object");
    result.emplace_back(*table, fmt::format("{}: {}[{}]", where_, key, i));
  }
  return result;
}

std::vector<double> JsonFields::numbers(std::string_view key) const {
  std::vector<double> result;
  const Array* items = list(key);
  for (size_t i = 0; items && i < items->size(); ++i) {
    const Value& item = (*items)[i];
    if (const double* real = item.as<double>()) {
      result.push_back(*real);
    } else if (const int64_t* whole = item.as<int64_t>()) {
      result.push_back(static_cast<double>(*whole));
    } else {
      fail_type(fmt::format("{}[{}]", key, i), item, "a number");
    }
  }
  return result;
}

std::vector<std::string> JsonFields::texts(std::string_view key) const {
  std::vector<std::string> result;
  const Array* items = list(key);
  for (size_t i = 0; items && i < items->size(); ++i) {
    const std::string* text = (*items)[i].as<std::string>();
    if (!text) fail_type(fmt::format("{}[{}]", key, i), (*items)[i], "a string");
    result.push_back(*text);
  }
  return result;
}

}  // namespace oryx::evaluation
