#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <functional>
#include <limits>

#include "base/error.h"
#include "formats/file.h"
#include "formats/json.h"
#include "formats/temporary_directory.h"
#include "formats/toml.h"

namespace oryx::formats {
namespace {

template <class T>
const T& get(const Table& table, std::string_view path) {
  static Table flat;
  flat = flatten(table);
  const Value* value = flat.find(path);
  expect(value && value->as<T>(), "no {}", path);
  return *value->as<T>();
}

std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Toml, ReadsEveryTypeWithItsLine) {
  const Table table = parse_toml(
      "top = 1\n[model]\nwidth = 384\nrate = 1e-3\ngate = true\nnorm = 'full'\n"
      "mixers = [\"attention\", \"ssd\"]\nattention.query_activation = \"silu\"\n",
      "r.toml");
  EXPECT_EQ(get<int64_t>(table, "top"), 1);
  EXPECT_EQ(get<int64_t>(table, "model.width"), 384);
  EXPECT_EQ(get<double>(table, "model.rate"), 1e-3);
  EXPECT_TRUE(get<bool>(table, "model.gate"));
  EXPECT_EQ(get<std::string>(table, "model.norm"), "full");
  EXPECT_EQ(get<Array>(table, "model.mixers").size(), 2u);
  EXPECT_EQ(get<std::string>(table, "model.attention.query_activation"), "silu");
  EXPECT_EQ(section(table, "model").find("width")->origin.in(), " in r.toml:3");
}

TEST(Toml, ErrorsNameFileAndLine) {
  EXPECT_TRUE(error_of([] { parse_toml("a = 1\nb = = 2\n", "r.toml"); }).starts_with("r.toml:2: "));
  EXPECT_TRUE(error_of([] { parse_toml("a = 1\na = 2\n", "r.toml"); }).starts_with("r.toml:2: "));
  EXPECT_TRUE(error_of([] { parse_toml("\na = 2024-01-01\n", "r.toml"); }).starts_with("r.toml:2: dates"));
  EXPECT_NE(error_of([] { read_toml("/no/such.toml"); }).find("/no/such.toml"), std::string::npos);
}

TEST(Toml, OverridesAreTomlOrBareWords) {
  Table root = parse_toml("[model]\nwidth = 1\nattention.scale = 1.0\n", "r.toml");
  apply_overrides(root, {"model.width=2", "model.width=3", "model.attention.scale=0.5", "model.gate=false",
                         "model.mixers=[\"ssd\"]", "run.directory=runs/x-1",
                         "schedule.fixed=linear,attention@97.5%", "model.norm=none", "run.name=\"a b\"",
                         "run.day=2024-01-01", "run.note=x # y", "run.two=1\nother=2", "run.equals=a=b"});
  EXPECT_EQ(get<int64_t>(root, "model.width"), 3);
  EXPECT_EQ(get<double>(root, "model.attention.scale"), 0.5);
  EXPECT_FALSE(get<bool>(root, "model.gate"));
  EXPECT_EQ(get<Array>(root, "model.mixers").size(), 1u);
  EXPECT_EQ(get<std::string>(root, "run.directory"), "runs/x-1");
  EXPECT_EQ(get<std::string>(root, "schedule.fixed"), "linear,attention@97.5%");
  EXPECT_EQ(get<std::string>(root, "model.norm"), "none");
  EXPECT_EQ(get<std::string>(root, "run.name"), "a b");
  EXPECT_EQ(get<std::string>(root, "run.day"), "2024-01-01");
  EXPECT_EQ(get<std::string>(root, "run.note"), "x # y");
  EXPECT_EQ(get<std::string>(root, "run.two"), "1\nother=2");
  EXPECT_EQ(get<std::string>(root, "run.equals"), "a=b");
  EXPECT_EQ(section(root, "model").find("width")->origin.in(), " in the command line");

  for (const char* wrong :
       {"model.width", "width=3", ".width=3", "model.=3", "model..width=3", "model.width=", "=3"}) {
    EXPECT_THROW(apply_overrides(root, {wrong}), UsageError) << wrong;
  }
  EXPECT_THROW(apply_overrides(root, {"model.mixers=[ssd"}), UsageError);
  EXPECT_THROW(apply_overrides(root, {"model.width.x=3"}), Error);
}

TEST(Toml, RecipesBuildOnOthers) {
  TemporaryDirectory directory;
  std::filesystem::create_directory(directory.path() / "ablations");
  write_file_atomic(directory.file("a.toml"),
                    "[model]\nwidth = 1\nlayers = 2\nmixers = [\"attention\", \"ssd\"]\n");
  write_file_atomic(directory.file("b.toml"), "base = \"a.toml\"\n[model]\nlayers = 3\n");
  write_file_atomic(directory.file("ablations/c.toml"),
                    "base = \"../b.toml\"\n[model]\nmixers = [\"ssd\"]\n");
  const Table table = read_recipe(directory.file("ablations/c.toml"));
  EXPECT_EQ(get<int64_t>(table, "model.width"), 1);
  EXPECT_EQ(get<int64_t>(table, "model.layers"), 3);
  EXPECT_EQ(get<Array>(table, "model.mixers").size(), 1u);
  EXPECT_EQ(table.find("base"), nullptr);
  EXPECT_EQ(section(table, "model").find("layers")->origin.in(), " in " + directory.file("b.toml") + ":3");

  write_file_atomic(directory.file("x.toml"), "base = \"y.toml\"\n");
  write_file_atomic(directory.file("y.toml"), "base = \"./ablations/../x.toml\"\n");
  EXPECT_NE(error_of([&] { read_recipe(directory.file("x.toml")); }).find("circle"), std::string::npos);
  write_file_atomic(directory.file("z.toml"), "\nbase = \"none.toml\"\n");
  EXPECT_NE(error_of([&] { read_recipe(directory.file("z.toml")); }).find("z.toml:2: no file"),
            std::string::npos);
  write_file_atomic(directory.file("z.toml"), "base = 3\n");
  EXPECT_NE(error_of([&] { read_recipe(directory.file("z.toml")); }).find("base = 3"), std::string::npos);
}

TEST(Json, RejectsWhatItCannotHold) {
  EXPECT_NE(error_of([] { parse_json("{\"a\":1,\"a\":2}", "f"); }).find("\"a\" is given twice"),
            std::string::npos);
  EXPECT_TRUE(
      error_of([] { parse_json("{\"a\":}", "f"); }).starts_with("f: malformed JSON at byte 6: syntax error"));
  EXPECT_NE(error_of([] { parse_json("{} x", "f"); }), "no error");
  EXPECT_NE(error_of([] { parse_json("", "f"); }), "no error");
  EXPECT_NE(error_of([] { parse_json("\"\xff\"", "f"); }), "no error");
  EXPECT_NE(error_of([] { parse_json("18446744073709551615", "f"); }).find("64 bits"), std::string::npos);
  EXPECT_NE(error_of([] { parse_json(std::string(100000, '['), "f"); }).find("nested deeper"),
            std::string::npos);
  EXPECT_NE(error_of([] { to_json(Value{std::numeric_limits<double>::infinity()}); }), "no error");
  EXPECT_EQ(to_json(Value{std::string("\xff")}), "\"\xEF\xBF\xBD\"");
  EXPECT_EQ(to_json(parse_json(" {\"b\":[1,2.5,null,true],\"a\":{}} ", "f")),
            "{\"b\":[1,2.5,null,true],\"a\":{}}");
}

// A flat table as config structs make it: every type, odd keys and strings.
Table arbitrary_table() {
  Table table;
  const int count = *rc::gen::inRange(0, 6);
  for (int i = 0; i < count; ++i) {
    const auto text = *rc::gen::container<std::string>(rc::gen::inRange<char>(1, 127));
    const auto number = *rc::gen::arbitrary<double>();
    const Value values[] = {{*rc::gen::arbitrary<bool>()},
                            {*rc::gen::arbitrary<int64_t>()},
                            {number},
                            {text},
                            {Array{{text}, {text + "x"}}}};
    table.set(fmt::format("{}.{}", i, text.empty() ? "k" : "a" + std::to_string(i)),
              values[*rc::gen::inRange<size_t>(0, std::size(values))]);
  }
  return table;
}

void expect_same(const Table& a, const Table& b) {
  RC_ASSERT(a.entries.size() == b.entries.size());
  for (const Entry& entry : a.entries) {
    const Value* other = b.find(entry.key);
    RC_ASSERT(other != nullptr);
    RC_ASSERT(to_json(entry.value) == to_json(*other));
    RC_ASSERT(entry.value.data.index() == other->data.index());
  }
}

TEST(ConfigFiles, WhatIsWrittenReadsBackInBothForms) {
  EXPECT_TRUE(rc::check([] {
    const Table table = arbitrary_table();
    const Table json = std::get<Table>(parse_json(to_json(table, 2), "j").data);
    expect_same(table, json);
    expect_same(table, flatten(parse_toml(to_toml(table), "t")));
    Table nested;
    nested.set("model", {table, {}});
    nested.set("name", {std::string("x"), {}});
    const Table read = parse_toml(to_toml(nested), "t");
    expect_same(table, flatten(section(read, "model")));
    RC_ASSERT(read.find("name") != nullptr);
  }));
}

TEST(ConfigFiles, ArbitraryTextParsesOrThrowsError) {
  EXPECT_TRUE(rc::check([] {
    const auto text =
        *rc::gen::container<std::string>(rc::gen::elementOf(std::string("{}[]\"'\\ab=:,.#\n -1e\x80\xff")));
    for (const bool json : {true, false}) {
      try {
        json ? (void)parse_json(text, "f") : (void)parse_toml(text, "f");
      } catch (const Error&) {
      }
    }
  }));
}

}  // namespace
}  // namespace oryx::formats
