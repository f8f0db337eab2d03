// One description of a config struct's fields reads, prints, validates and documents it.
//
//   struct ModelConfig {
//     int64_t layers = 0;
//     std::string norm = "full";
//     std::optional<double> dropout;
//     template <class Visitor>
//     void visit_fields(Visitor& visitor) {
//       visitor.required("layers", layers, "blocks, one after the other");
//       visitor.choice("norm", norm, {"full", "per_head", "none"}, "what the norm after the mixer spans");
//       visitor("dropout", dropout, "probability, none by default");
//     }
//   };
//
// Field types: bool, int64_t, double, std::string, std::vector<std::string>, std::vector<int64_t>, and
// std::optional of each; an optional that is absent is not written. Keys may hold dots; nested tables and
// flat dotted keys read alike. choice() restricts a string, or each string of a list.
#pragma once

#include <concepts>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/value.h"

namespace oryx {

struct FieldInfo {
  std::string key;
  std::string doc;
  bool required = false;
  std::vector<std::string> allowed;  // empty: anything of the type
  std::string type;                  // "an integer", as error messages name it
};

// What visit_fields sees: Derived gets field(FieldInfo, member) for each.
template <class Derived>
class FieldVisitor {
 public:
  template <class T>
  void operator()(std::string key, T& member, std::string doc);
  template <class T>
  void required(std::string key, T& member, std::string doc);
  template <class T>
  void choice(std::string key, T& member, std::vector<std::string> allowed, std::string doc);
  template <class T>
  void required_choice(std::string key, T& member, std::vector<std::string> allowed, std::string doc);
};

// The fields in the order of visit_fields.
template <class Config>
std::vector<FieldInfo> describe_fields(const Config& config);

// Sets the fields that `table` holds and keeps the others. Throws Error naming key and file for an unknown
// key (with the nearest valid one), a wrong type or value, and a missing required key. `section_name` only
// serves the messages: "model" makes them say model.width; "" leaves the key alone.
template <class Config>
void read_fields(Config& config, const Table& table, std::string_view section_name);

// Every field with its value, in order, as one flat table with dotted keys.
template <class Config>
Table field_table(const Config& config);

// ---------------------------------------------------------------------------------------------------------

namespace fields {

template <class T>
struct IsOptional : std::false_type {};
template <class T>
struct IsOptional<std::optional<T>> : std::true_type {};

template <class T>
std::string type_name() {
  if constexpr (IsOptional<T>::value) return type_name<typename T::value_type>();
  if constexpr (std::same_as<T, bool>) return "true or false";
  if constexpr (std::same_as<T, int64_t>) return "an integer";
  if constexpr (std::same_as<T, double>) return "a number";
  if constexpr (std::same_as<T, std::string>) return "a string";
  if constexpr (std::same_as<T, std::vector<std::string>>) return "a list of strings";
  if constexpr (std::same_as<T, std::vector<int64_t>>) return "a list of integers";
}

// False where the value is of another type. An integer serves as a number, never the reverse.
bool assign(const Value& value, bool& member);
bool assign(const Value& value, int64_t& member);
bool assign(const Value& value, double& member);
bool assign(const Value& value, std::string& member);
bool assign(const Value& value, std::vector<std::string>& member);
bool assign(const Value& value, std::vector<int64_t>& member);

template <class T>
bool assign(const Value& value, std::optional<T>& member) {
  if (value.as<std::nullptr_t>()) {
    member.reset();
    return true;
  }
  T inner{};
  if (!assign(value, inner)) return false;
  member = std::move(inner);
  return true;
}

Value to_value(bool member);
Value to_value(int64_t member);
Value to_value(double member);
Value to_value(const std::string& member);
Value to_value(const std::vector<std::string>& member);
Value to_value(const std::vector<int64_t>& member);

void expect_known_keys(const Table& flat, const std::vector<FieldInfo>& known, std::string_view section_name);
[[noreturn]] void fail_missing(const FieldInfo& field, const Table& table, std::string_view section_name);
[[noreturn]] void fail_type(const FieldInfo& field, const Value& value, std::string_view section_name);
void expect_allowed(const FieldInfo& field, const Value& value, std::string_view section_name);

class Describer : public FieldVisitor<Describer> {
 public:
  template <class T>
  void field(FieldInfo info, T&) {
    infos.push_back(std::move(info));
  }
  std::vector<FieldInfo> infos;
};

class Reader : public FieldVisitor<Reader> {
 public:
  Reader(const Table& flat, std::string_view section_name) : flat_(flat), section_name_(section_name) {}

  template <class T>
  void field(const FieldInfo& info, T& member) {
    const Value* value = flat_.find(info.key);
    if (!value) {
      if (info.required) fail_missing(info, flat_, section_name_);
      return;
    }
    if (!assign(*value, member)) fail_type(info, *value, section_name_);
    expect_allowed(info, *value, section_name_);
  }

 private:
  const Table& flat_;
  std::string_view section_name_;
};

class Writer : public FieldVisitor<Writer> {
 public:
  template <class T>
  void field(const FieldInfo& info, T& member) {
    if constexpr (IsOptional<T>::value) {
      if (member) table.set(info.key, to_value(*member));
    } else {
      table.set(info.key, to_value(member));
    }
  }
  Table table;
};

}  // namespace fields

template <class Derived>
template <class T>
void FieldVisitor<Derived>::operator()(std::string key, T& member, std::string doc) {
  static_cast<Derived*>(this)->field(
      FieldInfo{std::move(key), std::move(doc), false, {}, fields::type_name<T>()}, member);
}

template <class Derived>
template <class T>
void FieldVisitor<Derived>::required(std::string key, T& member, std::string doc) {
  static_cast<Derived*>(this)->field(
      FieldInfo{std::move(key), std::move(doc), true, {}, fields::type_name<T>()}, member);
}

template <class Derived>
template <class T>
void FieldVisitor<Derived>::choice(std::string key, T& member, std::vector<std::string> allowed,
                                   std::string doc) {
  static_cast<Derived*>(this)->field(
      FieldInfo{std::move(key), std::move(doc), false, std::move(allowed), fields::type_name<T>()}, member);
}

template <class Derived>
template <class T>
void FieldVisitor<Derived>::required_choice(std::string key, T& member, std::vector<std::string> allowed,
                                            std::string doc) {
  static_cast<Derived*>(this)->field(
      FieldInfo{std::move(key), std::move(doc), true, std::move(allowed), fields::type_name<T>()}, member);
}

template <class Config>
std::vector<FieldInfo> describe_fields(const Config& config) {
  fields::Describer describer;
  Config copy = config;  // visit_fields is not const: it serves readers too
  copy.visit_fields(describer);
  return std::move(describer.infos);
}

template <class Config>
void read_fields(Config& config, const Table& table, std::string_view section_name) {
  const Table flat = flatten(table);
  // First the unknown keys: a mistyped required key is named as itself, not as a missing one.
  fields::expect_known_keys(flat, describe_fields(config), section_name);
  Config read = config;
  fields::Reader reader(flat, section_name);
  read.visit_fields(reader);
  config = std::move(read);
}

template <class Config>
Table field_table(const Config& config) {
  fields::Writer writer;
  Config copy = config;
  copy.visit_fields(writer);
  return std::move(writer.table);
}

}  // namespace oryx
