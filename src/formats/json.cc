#include "formats/json.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "base/error.h"
#include "formats/file.h"

namespace oryx::formats {
namespace {

using Json = nlohmann::ordered_json;

// Builds the tree from the parser's events: the library's own tree would keep the last of two equal keys.
class TreeBuilder : public nlohmann::json_sax<Json> {
 public:
  explicit TreeBuilder(const std::string& source) : origin_{std::make_shared<const std::string>(source), 0} {}

  bool null() override { return add({nullptr, origin_}); }
  bool boolean(bool value) override { return add({value, origin_}); }
  bool number_integer(int64_t value) override { return add({value, origin_}); }
  bool number_unsigned(uint64_t value) override {
    expect(value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()),
           "{}: integer {} does not fit 64 bits with a sign", *origin_.source, value);
    return add({static_cast<int64_t>(value), origin_});
  }
  bool number_float(double value, const std::string&) override { return add({value, origin_}); }
  bool string(std::string& value) override { return add({std::move(value), origin_}); }
  bool binary(Json::binary_t&) override { return false; }
  bool start_object(size_t) override { return open({Table{{}, origin_}, origin_}); }
  bool end_object() override { return close(); }
  bool start_array(size_t) override { return open({Array{}, origin_}); }
  bool end_array() override { return close(); }

  bool key(std::string& name) override {
    expect(open_.back().keys.insert(name).second, "{}: key \"{}\" is given twice", *origin_.source, name);
    open_.back().key = std::move(name);
    return true;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    std::string_view what = error.what();
    if (const size_t mark = what.find("syntax error"); mark != std::string_view::npos)
      what.remove_prefix(mark);
    constexpr size_t kLongest = 160;  // it quotes what was read
    fail("{}: malformed JSON at byte {}: {}", *origin_.source, position, what.substr(0, kLongest));
  }

  Value take() { return std::move(root_); }

 private:
  struct Level {
    Value value;
    std::string key;  // of the member being read
    std::unordered_set<std::string> keys;
  };

  bool open(Value value) {
    constexpr size_t kMaximumDepth = 128;  // trees are freed recursively
    expect(open_.size() < kMaximumDepth, "{}: JSON nested deeper than {}", *origin_.source, kMaximumDepth);
    open_.push_back({std::move(value), {}, {}});
    return true;
  }

  bool close() {
    Value value = std::move(open_.back().value);
    open_.pop_back();
    return add(std::move(value));
  }

  bool add(Value value) {
    if (open_.empty()) {
      root_ = std::move(value);
    } else if (Array* array = std::get_if<Array>(&open_.back().value.data)) {
      array->push_back(std::move(value));
    } else {
      std::get<Table>(open_.back().value.data)
          .entries.push_back({std::move(open_.back().key), std::move(value)});
    }
    return true;
  }

  Origin origin_;
  Value root_;
  std::vector<Level> open_;
};

Json to_library(const Value& value);

Json to_library(const Table& table) {
  Json object = Json::object();
  for (const Entry& entry : table.entries) object.push_back({entry.key, to_library(entry.value)});
  return object;
}

Json to_library(const Value& value) {
  struct Visitor {
    Json operator()(const Array& array) const {
      Json list = Json::array();
      for (const Value& item : array) list.push_back(to_library(item));
      return list;
    }
    Json operator()(const Table& table) const { return to_library(table); }
    Json operator()(double number) const {
      expect(std::isfinite(number), "JSON cannot hold the number {}", number);
      return number;
    }
    Json operator()(std::nullptr_t) const { return nullptr; }
    Json operator()(bool flag) const { return flag; }
    Json operator()(int64_t number) const { return number; }
    Json operator()(const std::string& text) const { return text; }
  };
  return std::visit(Visitor{}, value.data);
}

std::string dump(const Json& json, int indent) {
  return json.dump(indent, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

Value parse_json(std::string_view text, const std::string& source) {
  TreeBuilder builder(source);
  Json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

Table read_json(const std::string& path) {
  Value value = parse_json(read_file(path), path);
  expect(value.as<Table>(), "{}: expected a JSON object at the top, got {}", path, value.text());
  return std::get<Table>(std::move(value.data));
}

std::string to_json(const Value& value, int indent) { return dump(to_library(value), indent); }
std::string to_json(const Table& table, int indent) { return dump(to_library(table), indent); }

}  // namespace oryx::formats
