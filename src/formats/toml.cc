#include "formats/toml.h"

// The distribution's package also has a compiled library; the header alone spares a dependency at run time.
#define TOML_HEADER_ONLY 1
// Some malformed texts break what its parser asserts, or with NDEBUG tells the compiler to assume, of the
// start of a key. It does neither here, and comes to the error that it has for them.
#pragma push_macro("NDEBUG")
#undef NDEBUG
#define TOML_ASSERT(condition) static_cast<void>(0)
#include <toml++/toml.h>
#pragma pop_macro("NDEBUG")

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "formats/file.h"

namespace oryx::formats {
namespace {

using Source = std::shared_ptr<const std::string>;

Value convert(const toml::node& node, const Source& source) {
  const Origin origin{source, static_cast<int64_t>(node.source().begin.line)};
  if (const toml::table* table = node.as_table()) {
    Table result{{}, origin};
    for (const auto& [key, item] : *table) result.set(std::string(key.str()), convert(item, source));
    return {std::move(result), origin};
  }
  if (const toml::array* array = node.as_array()) {
    Array result;
    for (const toml::node& item : *array) result.push_back(convert(item, source));
    return {std::move(result), origin};
  }
  if (const auto* text = node.as_string()) return {text->get(), origin};
  if (const auto* integer = node.as_integer()) return {integer->get(), origin};
  if (const auto* number = node.as_floating_point()) return {number->get(), origin};
  if (const auto* flag = node.as_boolean()) return {flag->get(), origin};
  fail("{}:{}: dates and times are not used here, write a string in quotes", *source, origin.line);
}

Table overlay_on_bases(const std::filesystem::path& path, std::vector<std::filesystem::path>& chain) {
  std::error_code ignored;
  const std::filesystem::path canonical = std::filesystem::weakly_canonical(path, ignored);
  const bool circle = std::find(chain.begin(), chain.end(), canonical) != chain.end();
  expect(!circle, "{}: base = … runs in a circle through {}",
         chain.empty() ? path.string() : chain.back().string(), path.string());
  chain.push_back(canonical);
  Table table = read_toml(path.string());
  const Value* base = table.find("base");
  if (!base) return table;
  const std::string* name = base->as<std::string>();
  expect(name && !name->empty(), "base = {}{}: expected the path of a recipe", base->text(),
         base->origin.in());
  const std::filesystem::path base_path = (path.parent_path() / *name).lexically_normal();
  expect(std::filesystem::exists(base_path), "base = {}{}: no file {}", base->text(), base->origin.in(),
         base_path.string());
  std::erase_if(table.entries, [](const Entry& entry) { return entry.key == "base"; });
  return overlay(overlay_on_bases(base_path, chain), table);
}

// The value of an override: TOML where it is TOML, else the text itself.
Value override_value(std::string_view text, const std::string& whole, const Source& source) {
  const Origin origin{source, 0};
  try {
    const toml::table table = toml::parse(fmt::format("value = {}\n", text));
    const toml::node& node = *table.get("value");
    const bool date = node.is_date() || node.is_time() || node.is_date_time();
    if (table.size() == 1 && !date) {
      Value value = convert(node, source);
      value.origin = origin;
      return value;
    }
  } catch (const toml::parse_error& error) {
    const bool meant_as_toml = text.find_first_of("[{\"'") == 0;
    if (meant_as_toml) fail_usage("{}: expected a TOML value after =: {}", whole, error.description());
  }
  return {std::string(text), origin};
}

std::string key_text(std::string_view key) {
  const bool bare = !key.empty() && std::all_of(key.begin(), key.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '_' || c == '-' || c == '.';
  });
  const bool dots = key.starts_with('.') || key.ends_with('.') || key.find("..") != std::string_view::npos;
  return bare && !dots ? std::string(key) : quote(key);
}

std::string value_text(const Value& value) {
  if (const Array* array = value.as<Array>()) {
    std::string text = "[";
    for (size_t i = 0; i < array->size(); ++i) text += (i > 0 ? ", " : "") + value_text((*array)[i]);
    return text + "]";
  }
  if (const Table* table = value.as<Table>()) {
    std::string text = "{";
    for (size_t i = 0; i < table->entries.size(); ++i) {
      const Entry& entry = table->entries[i];
      text += fmt::format("{}{} = {}", i > 0 ? ", " : " ", key_text(entry.key), value_text(entry.value));
    }
    return text + " }";
  }
  if (const std::string* text = value.as<std::string>()) return quote(*text);
  return value.text();
}

void write_table(std::string& text, const Table& table, const std::string& prefix) {
  for (const Entry& entry : table.entries) {
    if (entry.value.as<Table>() || entry.value.as<std::nullptr_t>()) continue;  // TOML has no null: left out
    text += fmt::format("{} = {}\n", key_text(entry.key), value_text(entry.value));
  }
  for (const Entry& entry : table.entries) {
    const Table* inner = entry.value.as<Table>();
    if (!inner) continue;
    const std::string name = prefix + key_text(entry.key);
    text += fmt::format("{}[{}]\n", text.empty() ? "" : "\n", name);
    write_table(text, *inner, name + ".");
  }
}

}  // namespace

Table parse_toml(std::string_view text, const std::string& source) {
  const Source name = std::make_shared<const std::string>(source);
  try {
    Value root = convert(toml::parse(text, source), name);
    Table table = std::get<Table>(std::move(root.data));
    table.origin = {name, 0};
    return table;
  } catch (const toml::parse_error& error) {
    fail("{}:{}: {}", source, error.source().begin.line, error.description());
  }
}

Table read_toml(const std::string& path) { return parse_toml(read_file(path), path); }

Table read_recipe(const std::string& path) {
  std::vector<std::filesystem::path> chain;
  return overlay_on_bases(path, chain);
}

void apply_overrides(Table& root, const std::vector<std::string>& overrides) {
  const Source source = std::make_shared<const std::string>("the command line");
  for (const std::string& text : overrides) {
    const size_t equals = text.find('=');
    const std::string key = text.substr(0, equals);
    const size_t dot = key.find('.');
    const bool well_formed = equals != std::string::npos && equals + 1 < text.size() &&
                             dot != std::string::npos && dot > 0 && !key.ends_with('.') &&
                             key.find("..") == std::string::npos &&
                             key.find_first_of(" \t\"'") == std::string::npos;
    if (!well_formed) fail_usage("\"{}\": expected section.key=value", text);
    set_path(root, key, override_value(std::string_view(text).substr(equals + 1), text, source));
  }
}

std::string to_toml(const Table& table) {
  std::string text;
  write_table(text, table, "");
  return text;
}

}  // namespace oryx::formats
