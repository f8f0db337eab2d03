#include "base/config_fields.h"

#include <algorithm>

#include "base/error.h"
#include "base/nearest_name.h"

namespace oryx::fields {
namespace {

std::string full_key(std::string_view section_name, std::string_view key) {
  return section_name.empty() ? std::string(key) : fmt::format("{}.{}", section_name, key);
}

template <class T>
bool assign_scalar(const Value& value, T& member) {
  const T* found = value.as<T>();
  if (found) member = *found;
  return found != nullptr;
}

template <class T>
bool assign_list(const Value& value, std::vector<T>& member) {
  const Array* array = value.as<Array>();
  if (!array) return false;
  std::vector<T> list(array->size());
  for (size_t i = 0; i < list.size(); ++i) {
    if (!assign_scalar((*array)[i], list[i])) return false;
  }
  member = std::move(list);
  return true;
}

template <class T>
Value list_value(const std::vector<T>& list) {
  Array array;
  for (const T& item : list) array.push_back(to_value(item));
  return {std::move(array), {}};
}

}  // namespace

bool assign(const Value& value, bool& member) { return assign_scalar(value, member); }
bool assign(const Value& value, int64_t& member) { return assign_scalar(value, member); }
bool assign(const Value& value, std::string& member) { return assign_scalar(value, member); }
bool assign(const Value& value, std::vector<std::string>& member) { return assign_list(value, member); }
bool assign(const Value& value, std::vector<int64_t>& member) { return assign_list(value, member); }
bool assign(const Value& value, double& member) {
  if (const int64_t* integer = value.as<int64_t>()) {
    member = static_cast<double>(*integer);
    return true;
  }
  return assign_scalar(value, member);
}

Value to_value(bool member) { return {member, {}}; }
Value to_value(int64_t member) { return {member, {}}; }
Value to_value(double member) { return {member, {}}; }
Value to_value(const std::string& member) { return {member, {}}; }
Value to_value(const std::vector<std::string>& member) { return list_value(member); }
Value to_value(const std::vector<int64_t>& member) { return list_value(member); }

void expect_known_keys(const Table& flat, const std::vector<FieldInfo>& known,
                       std::string_view section_name) {
  std::vector<std::string> keys;
  for (const FieldInfo& field : known) keys.push_back(field.key);
  for (const Entry& entry : flat.entries) {
    if (std::find(keys.begin(), keys.end(), entry.key) != keys.end()) continue;
    fail("unknown key {}{}, did you mean {}?", full_key(section_name, entry.key), entry.value.origin.in(),
         full_key(section_name, nearest_name(entry.key, keys)));
  }
}

void fail_missing(const FieldInfo& field, const Table& table, std::string_view section_name) {
  std::string source;  // no line: the key stands nowhere
  if (table.origin.source) source = " in " + *table.origin.source;
  fail("missing key {}{}, expected {} ({})", full_key(section_name, field.key), source,
       field.allowed.empty() ? field.type : one_of(field.allowed), field.doc);
}

void fail_type(const FieldInfo& field, const Value& value, std::string_view section_name) {
  fail("{} = {}{}: expected {}", full_key(section_name, field.key), value.text(), value.origin.in(),
       field.type);
}

void expect_allowed(const FieldInfo& field, const Value& value, std::string_view section_name) {
  if (field.allowed.empty()) return;
  const auto allowed = [&](const Value& item) {
    const std::string* text = item.as<std::string>();
    return !text || std::find(field.allowed.begin(), field.allowed.end(), *text) != field.allowed.end();
  };
  const Array* array = value.as<Array>();
  if (array ? std::all_of(array->begin(), array->end(), allowed) : allowed(value)) return;
  fail("{} = {}{}: expected {}{}", full_key(section_name, field.key), value.text(), value.origin.in(),
       array ? "a list of " : "", one_of(field.allowed));
}

}  // namespace oryx::fields
