#include "base/value.h"

#include <cmath>

#include "base/error.h"
#include "base/nearest_name.h"

namespace oryx {

std::string Origin::in() const {
  if (!source) return "";
  return line > 0 ? fmt::format(" in {}:{}", *source, line) : fmt::format(" in {}", *source);
}

const Value* Table::find(std::string_view key) const {
  for (const Entry& entry : entries) {
    if (entry.key == key) return &entry.value;
  }
  return nullptr;
}

Value* Table::find(std::string_view key) { return const_cast<Value*>(std::as_const(*this).find(key)); }

void Table::set(std::string key, Value value) {
  if (Value* existing = find(key)) {
    *existing = std::move(value);
  } else {
    entries.push_back({std::move(key), std::move(value)});
  }
}

bool Table::empty() const { return entries.empty(); }

Value::Value() = default;
Value::Value(Data data_value, Origin origin_value)
    : data(std::move(data_value)), origin(std::move(origin_value)) {}
Value::Value(const Value&) = default;
Value::Value(Value&&) noexcept = default;
Value& Value::operator=(const Value&) = default;
Value& Value::operator=(Value&&) noexcept = default;
Value::~Value() = default;

std::string float_text(double number) {
  if (std::isnan(number)) return "nan";
  if (std::isinf(number)) return number < 0 ? "-inf" : "inf";
  std::string text = fmt::format("{}", number);
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

std::string quote(std::string_view text) {
  std::string result = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        result += "\\\"";
        break;
      case '\\':
        result += "\\\\";
        break;
      case '\n':
        result += "\\n";
        break;
      case '\t':
        result += "\\t";
        break;
      case '\r':
        result += "\\r";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
          result += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
        } else {
          result += c;
        }
    }
  }
  return result + "\"";
}

std::string Value::text() const {
  constexpr size_t kLimit = 60;
  struct Visitor {
    std::string operator()(std::nullptr_t) const { return "null"; }
    std::string operator()(bool value) const { return value ? "true" : "false"; }
    std::string operator()(int64_t value) const { return std::to_string(value); }
    std::string operator()(double value) const { return float_text(value); }
    std::string operator()(const std::string& value) const {
      return value.size() <= kLimit ? quote(value) : quote(value.substr(0, kLimit)) + "…";
    }
    std::string operator()(const Array& values) const {
      std::string text = "[";
      for (size_t i = 0; i < values.size(); ++i) {
        if (i > 0) text += ", ";
        if (text.size() > kLimit) return text + "…]";
        text += values[i].text();
      }
      return text + "]";
    }
    std::string operator()(const Table& table) const {
      return table.empty() ? "{}" : fmt::format("{{{} = …}}", table.entries.front().key);
    }
  };
  return std::visit(Visitor{}, data);
}

void set_path(Table& root, std::string_view path, Value value) {
  Table* table = &root;
  std::string_view rest = path;
  for (size_t dot; !table->find(rest) && (dot = rest.find('.')) != std::string_view::npos;) {
    const std::string key(rest.substr(0, dot));
    if (!table->find(key)) table->set(key, {Table{{}, value.origin}, value.origin});
    Value& inner = *table->find(key);
    table = std::get_if<Table>(&inner.data);
    if (!table)
      fail("cannot set {}: {} = {}{} is no table", path, path.substr(0, path.size() - rest.size() + dot),
           inner.text(), inner.origin.in());
    rest.remove_prefix(dot + 1);
  }
  table->set(std::string(rest), std::move(value));
}

Table overlay(Table under, const Table& over) {
  if (over.origin.source) under.origin = over.origin;
  for (const Entry& entry : over.entries) {
    Value* existing = under.find(entry.key);
    Table* below = existing ? std::get_if<Table>(&existing->data) : nullptr;
    const Table* above = entry.value.as<Table>();
    if (below && above) {
      *below = overlay(std::move(*below), *above);
      existing->origin = entry.value.origin;
    } else {
      under.set(entry.key, entry.value);
    }
  }
  return under;
}

namespace {

void flatten_into(Table& flat, const Table& table, const std::string& prefix) {
  for (const Entry& entry : table.entries) {
    const std::string key = prefix + entry.key;
    if (const Table* inner = entry.value.as<Table>()) {
      flatten_into(flat, *inner, key + ".");
    } else {
      expect(!flat.find(key), "key {} is given twice{}", key, entry.value.origin.in());
      flat.set(key, entry.value);
    }
  }
}

}  // namespace

Table flatten(const Table& table) {
  Table flat{{}, table.origin};
  flatten_into(flat, table, "");
  return flat;
}

const Table& section(const Table& root, std::string_view name) {
  static const Table kEmpty;
  const Value* value = root.find(name);
  if (!value) return kEmpty;
  const Table* table = value->as<Table>();
  if (!table) fail("{} = {}{}: expected a section [{}]", name, value->text(), value->origin.in(), name);
  return *table;
}

void expect_sections(const Table& root, const std::vector<std::string>& sections) {
  for (const Entry& entry : root.entries) {
    bool known = false;
    for (const std::string& name : sections) known |= name == entry.key;
    expect(known, "unknown section {}{}, did you mean {}?", entry.key, entry.value.origin.in(),
           nearest_name(entry.key, sections));
    section(root, entry.key);
  }
}

}  // namespace oryx
