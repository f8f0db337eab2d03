#include "base/config_fields.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/nearest_name.h"

namespace oryx {
namespace {

struct Config {
  int64_t width = 0;
  bool gate = true;
  double rate = 0.5;
  std::string norm = "full";
  std::string activation = "none";
  std::vector<std::string> mixers = {"attention"};
  std::vector<int64_t> pattern;
  std::optional<double> dropout;

  template <class Visitor>
  void visit_fields(Visitor& visitor) {
    visitor.required("width", width, "channels");
    visitor("gate", gate, "multiply by a gate");
    visitor("rate", rate, "a rate");
    visitor.choice("norm", norm, {"full", "per_head", "none"}, "the norm");
    visitor.choice("attention.query_activation", activation, {"none", "silu"}, "after the projection");
    visitor.choice("mixers", mixers, {"attention", "ssd"}, "the mixers");
    visitor("pattern", pattern, "which layers");
    visitor("dropout", dropout, "a probability");
  }
};

Value value(Value data, int64_t line) {
  data.origin = {std::make_shared<const std::string>("r.toml"), line};
  return data;
}

Table table(std::vector<std::pair<std::string, Value>> entries) {
  Table result{{}, {std::make_shared<const std::string>("r.toml"), 0}};
  int64_t line = 1;
  for (auto& [key, item] : entries) result.set(key, value(item, line++));
  return result;
}

std::string read_error(const Table& source) {
  Config config;
  try {
    read_fields(config, source, "model");
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

const Value kWidth{int64_t{8}, {}};

TEST(ConfigFields, ReadsNestedAndFlatKeysAndKeepsDefaults) {
  Table inner;
  inner.set("query_activation", {std::string("silu"), {}});
  for (const Table& source :
       {table({{"width", kWidth}, {"attention", {inner, {}}}, {"rate", {int64_t{2}, {}}}}),
        table({{"width", kWidth},
               {"attention.query_activation", {std::string("silu"), {}}},
               {"rate", {2.0, {}}}})}) {
    Config config;
    read_fields(config, source, "model");
    EXPECT_EQ(config.width, 8);
    EXPECT_EQ(config.activation, "silu");
    EXPECT_EQ(config.rate, 2.0);
    EXPECT_EQ(config.norm, "full");
    EXPECT_FALSE(config.dropout.has_value());
  }
}

TEST(ConfigFields, WhatIsWrittenReadsBack) {
  Config config;
  config.width = 3;
  config.rate = 1e-5;
  config.mixers = {"ssd", "attention"};
  config.pattern = {1, 0};
  config.dropout = 0.1;
  const Table written = field_table(config);
  EXPECT_EQ(written.entries.front().key, "width");
  EXPECT_EQ(written.entries.size(), 8u);
  Config read;
  read_fields(read, written, "");
  EXPECT_EQ(read.width, 3);
  EXPECT_EQ(read.rate, 1e-5);
  EXPECT_EQ(read.mixers, config.mixers);
  EXPECT_EQ(read.pattern, config.pattern);
  EXPECT_EQ(read.dropout, config.dropout);
  EXPECT_EQ(field_table(Config{}).find("dropout"), nullptr);
}

TEST(ConfigFields, ErrorsNameKeyFileAndWhatWasExpected) {
  EXPECT_EQ(read_error(table({{"widht", kWidth}})),
            "unknown key model.widht in r.toml:1, did you mean model.width?");
  EXPECT_EQ(read_error(table({{"width", kWidth}, {"query_activation", {std::string("silu"), {}}}})),
            "unknown key model.query_activation in r.toml:2, did you mean model.attention.query_activation?");
  EXPECT_EQ(read_error(table({{"gate", {true, {}}}})),
            "missing key model.width in r.toml, expected an integer (channels)");
  EXPECT_EQ(read_error(table({{"width", {8.0, {}}}})), "model.width = 8.0 in r.toml:1: expected an integer");
  EXPECT_EQ(read_error(table({{"width", {std::string("a\"b"), {}}}})),
            "model.width = \"a\\\"b\" in r.toml:1: expected an integer");
  EXPECT_EQ(read_error(table({{"width", kWidth}, {"gate", {int64_t{1}, {}}}})),
            "model.gate = 1 in r.toml:2: expected true or false");
  EXPECT_EQ(read_error(table({{"width", kWidth}, {"mixers", {std::string("ssd"), {}}}})),
            "model.mixers = \"ssd\" in r.toml:2: expected a list of strings");
  EXPECT_EQ(read_error(table({{"width", kWidth}, {"norm", {std::string("ful"), {}}}})),
            "model.norm = \"ful\" in r.toml:2: expected \"full\", \"per_head\" or \"none\"");
  EXPECT_EQ(read_error(table({{"width", kWidth}, {"mixers", {Array{{std::string("mamba"), {}}}, {}}}})),
            "model.mixers = [\"mamba\"] in r.toml:2: expected a list of \"attention\" or \"ssd\"");
  EXPECT_EQ(read_error(table({{"width", {Table{}, {}}}})),
            "missing key model.width in r.toml, expected an integer (channels)");
  EXPECT_EQ(read_error(table({{"width", kWidth}, {"dropout", {std::string("x"), {}}}})),
            "model.dropout = \"x\" in r.toml:2: expected a number");
}

TEST(ConfigFields, AFailedReadChangesNothing) {
  Config config;
  EXPECT_THROW(read_fields(config, table({{"width", kWidth}, {"rate", {true, {}}}}), ""), Error);
  EXPECT_EQ(config.width, 0);
}

TEST(ConfigFields, DescribesItself) {
  const auto infos = describe_fields(Config{});
  ASSERT_EQ(infos.size(), 8u);
  EXPECT_TRUE(infos[0].required);
  EXPECT_EQ(infos[0].type, "an integer");
  EXPECT_EQ(infos[3].allowed.size(), 3u);
  EXPECT_EQ(infos[7].type, "a number");
}

TEST(Value, PathsOverlaysAndDuplicates) {
  Table root;
  set_path(root, "model.attention.scale", {2.0, {}});
  set_path(root, "model.width", kWidth);
  EXPECT_EQ(flatten(root).entries.size(), 2u);
  EXPECT_THROW(set_path(root, "model.width.x", kWidth), Error);
  // A key that holds dots already is set where it stands.
  Table flat = table({{"a.b", kWidth}});
  set_path(flat, "a.b", {int64_t{9}, {}});
  EXPECT_EQ(*flat.find("a.b")->as<int64_t>(), 9);

  Table over;
  set_path(over, "model.width", {int64_t{16}, {}});
  const Table both = flatten(overlay(root, over));
  EXPECT_EQ(*both.find("model.width")->as<int64_t>(), 16);
  EXPECT_EQ(*both.find("model.attention.scale")->as<double>(), 2.0);

  root.set("model.width", kWidth);
  EXPECT_THROW(flatten(root), Error);
}

TEST(Value, Sections) {
  Table root;
  set_path(root, "modle.width", kWidth);
  try {
    expect_sections(root, {"data", "model"});
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "unknown section modle, did you mean model?");
  }
  EXPECT_TRUE(section(root, "data").empty());
  root.set("data", kWidth);
  EXPECT_THROW(section(root, "data"), Error);
}

TEST(NearestName, CountsEdits) {
  EXPECT_EQ(edit_distance("", "abc"), 3);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3);
  EXPECT_EQ(edit_distance("widht", "width"), 1);
  EXPECT_EQ(edit_distance("same", "same"), 0);
  EXPECT_EQ(nearest_name("trian", {"generate", "train", "inspect"}), "train");
  EXPECT_EQ(nearest_name("activation", {"action", "attention.activation"}), "attention.activation");
  EXPECT_EQ(nearest_name("x", {}), "");
  EXPECT_EQ(one_of({"a", "b", "c"}), "\"a\", \"b\" or \"c\"");
}

}  // namespace
}  // namespace oryx
