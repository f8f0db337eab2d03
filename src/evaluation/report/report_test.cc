#include "evaluation/report/report.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "evaluation/report/json_fields.h"
#include "evaluation/report/paper.h"
#include "evaluation/report/section_tools.h"
#include "formats/json.h"
#include "formats/temporary_directory.h"

namespace oryx::evaluation {
namespace {

namespace fs = std::filesystem;

size_t count(const std::string& text, const std::string& part) {
  size_t found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

constexpr const char* kConfig =
    R"({"layers":1,"width":32,"heads":2,"mlp_width":48,"vocabulary":260,"mixers":["attention","ssd"]})";

class Report : public ::testing::Test {
 protected:
  fs::path write(const fs::path& name, const std::string& text) {
    const fs::path path = folder_.path() / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << text;
    return path;
  }
  std::string place(const char* name) const { return (folder_.path() / name).string(); }

  void write_run(const std::string& name, const std::string& more = "") {
    std::string text = R"({"kind":"validation","step":0,"tokens":0,"loss":{"attention":6.0,"linear":6.1}})"
                       "\n";
    for (int step = 1; step <= 1000; ++step) {
      text += fmt::format(
          R"({{"kind":"train","step":{0},"tokens":{1},"loss":{2},"learning_rate":0.001,"gradient_norm":0.5,"attention_share":0.25,"tokens_per_second":1e6,"seconds":{0}}})"
          "\n",
          step, step * 4096, 6.0 - step * 1e-3);
    }
    text += R"({"kind":"validation","step":1000,"tokens":4096000,"loss":{"attention":5.0,"linear":5.25}})"
            "\n";
    write(fs::path(name) / "metrics.jsonl", text + more);
  }

  static std::string task(double value, const std::string& more = "") {
    return fmt::format(
        R"({{"items":100,"metrics":{{"acc":{{"value":{},"standard_error":0.01}}}},"main":"acc","group":"language","tokens":1000,"attention_tokens":250,"flops":1e9,"state_bytes":4096,"seconds":2.0{}}})",
        value, more);
  }
  static std::string evaluation(const std::string& runs) {
    return R"({"format":"oryx.evaluation","version":1,"model":{"directory":"m","name":"tiny <b>","mixers":["attention","ssd"],"parameters":130000000,"config":)" +
           std::string(kConfig) +
           R"(},"device":"cpu","dtype":"float32","seed":0,"limit":100,"command":"oryx evaluate m","runs":[)" +
           runs + "]}";
  }
  static std::string run(const std::string& schedule, const std::string& tasks) {
    return fmt::format(R"({{"schedule":"{}","tasks":{{{}}},"averages":{{"language":0.4321}}}})", schedule,
                       tasks);
  }

  formats::TemporaryDirectory folder_;
};

TEST_F(Report, ReadsEveryKindAndNamesThem) {
  write_run("runs/a/model");
  write_run("runs/b/model");
  write("tiny/config.json", kConfig);
  write("scores/results.json", evaluation(run("linear", "\"piqa\":" + task(0.6))));
  write("text.jsonl",
        R"({"schedule":"linear","prompt_tokens":1,"pieces":[{"text":"x","mode":"linear","prompt":true}]})"
        "\n\n");
  const Sources sources = read_sources({place("runs/a/model"), place("runs/b/model"),
                                        "named=" + place("tiny"), place("scores"), place("text.jsonl")});
  ASSERT_EQ(sources.training.size(), 2u);
  EXPECT_EQ(sources.training[0].name.label, "a/model");  // "model" alone says nothing
  EXPECT_EQ(sources.training[1].name.label, "b/model");
  EXPECT_EQ(sources.training[0].steps, 1000);
  EXPECT_EQ(sources.training[0].validation.size(), 2u);
  EXPECT_EQ(sources.training[0].validation[1].second.y, (std::vector<double>{6.1, 5.25}));
  ASSERT_EQ(sources.models.size(), 1u);
  EXPECT_EQ(sources.models[0].name.label, "named");
  ASSERT_EQ(sources.evaluations.size(), 1u);
  EXPECT_EQ(sources.evaluations[0].runs[0].task("piqa")->metric("acc")->value, 0.6);
  ASSERT_EQ(sources.samples.size(), 1u);
  EXPECT_TRUE(sources.samples[0].samples[0].pieces[0].is_prompt);
}

TEST_F(Report, LabelsTellPathsApart) {
  write_run("x/one/curve");
  write_run("y/one/curve");
  write_run("y/two/latest");
  const Sources sources = read_sources({place("x/one/curve"), place("y/one/curve"), place("y/two/latest")});
  EXPECT_EQ(sources.training[0].name.label, "x/one/curve");
  EXPECT_EQ(sources.training[1].name.label, "y/one/curve");
  EXPECT_EQ(sources.training[2].name.label, "two");
}

TEST_F(Report, ALineThatIsBeingWrittenIsLeftOut) {
  write_run("run", R"({"kind":"train","step":1001,"tok)");
  EXPECT_EQ(read_sources({place("run")}).training[0].steps, 1000);
}

TEST_F(Report, NullIsNoNumber) {
  write(
      "scores/results.json",
      evaluation(run(
          "linear",
          R"("lambada":{"items":5,"metrics":{"ppl":{"value":null,"standard_error":null}},"main":"ppl","group":"language"})")));
  const Sources sources = read_sources({place("scores")});
  EXPECT_FALSE(sources.evaluations[0].runs[0].task("lambada")->metric("ppl")->value.has_value());
  EXPECT_NE(report_html(sources, {}).find("∞"), std::string::npos);
}

TEST_F(Report, SaysWhatIsWrongAndWhere) {
  fs::create_directories(place("empty"));
  write("odd.txt", "hello\n");
  write("list.jsonl", "[1]\n");
  write("broken/metrics.jsonl", "{\"kind\":\"train\",\"step\":1,\"tokens\":5}\n{\"kind\"\n");
  write("nothing/metrics.jsonl", "");
  write("other/results.json", R"({"format":"something"})");
  write("later/results.json", R"({"format":"oryx.evaluation","version":2})");
  write(
      "wrong/results.json",
      evaluation(run("linear", "\"piqa\":" + task(0.5, ",\"cells\":[{\"length\":\"long\",\"depth\":0.5}]"))));
  write("mode/s.jsonl", R"({"pieces":[{"text":"x","mode":"magic"}]})"
                        "\n");
  write(
      "curve/curve.json",
      R"({"windows":2,"length":4,"smooth":1,"curves":[{"schedule":"linear","perplexity":2.0,"smoothed_perplexity":[1.0]}]})");
  const auto message = [&](const std::string& name) {
    return error_of([&] { read_sources({place(name.c_str())}); });
  };
  const auto expect_mentions = [&](const std::string& name, const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
      EXPECT_NE(message(name).find(part), std::string::npos) << message(name);
    EXPECT_EQ(count(message(name), "\n"), 0u) << message(name);
  };
  expect_mentions("missing", {"missing", "no such file"});
  expect_mentions("empty", {"empty", "metrics.jsonl", "curve.json"});
  expect_mentions("odd.txt", {"odd.txt", "oryx generate --json"});
  expect_mentions("list.jsonl", {"list.jsonl:1", "pieces"});
  expect_mentions("broken", {"metrics.jsonl:2"});
  expect_mentions("nothing", {"metrics.jsonl", "no step"});
  expect_mentions("other", {"results.json", "not the result"});
  expect_mentions("later", {"version is 2"});
  expect_mentions("wrong", {"results.json", "runs[0]", "piqa", "cells[0]", "length", "an integer"});
  expect_mentions("mode/s.jsonl", {"pieces[0]", "magic"});
  expect_mentions("curve", {"curve.json", "curves[0]", "1 positions", "expected 4"});
}

TEST_F(Report, PageHoldsWhatTheSourcesHold) {
  write_run("run");
  const std::string cells =
      ",\"cells\":[{\"length\":1024,\"depth\":0.5,\"value\":0.25,\"items\":4},{\"length\":2048,\"depth\":0.5,"
      "\"value\":1.0,\"items\":4}]";
  std::string recall = task(0.7,
                            ",\"cells\":[{\"length\":64,\"pairs\":8,\"value\":0.5,\"items\":3},"
                            "{\"length\":64,\"pairs\":2,\"value\":1.0,\"items\":3}]");
  recall.replace(recall.find("language"), 8, "recall");
  std::string needle = task(0.7, cells);
  needle.replace(needle.find("language"), 8, "needle");
  write(
      "scores/results.json",
      evaluation(
          run("linear", "\"piqa\":" + task(0.6) + ",\"needle_single_1\":" + needle + ",\"mqar\":" + recall) +
          "," + run("attention", "\"piqa\":" + task(0.7)) + "," + run("every(4)", "\"piqa\":" + task(0.65))));
  write(
      "s.jsonl",
      R"({"model":"m","schedule":"linear","pieces":[{"text":"<script>alert(1)</script>","mode":"attention"}]})"
      "\n");
  const std::string page =
      report_html(read_sources({"<i>=" + place("run"), place("scores"), place("s.jsonl")}), {});
  for (const char* id : {"models", "training", "tasks", "needles", "recall", "cost", "samples"}) {
    EXPECT_EQ(count(page, fmt::format("<section id=\"{}\">", id)), 1u) << id;
    EXPECT_EQ(count(page, fmt::format("href=\"#{}\"", id)), 1u) << id;
  }
  EXPECT_EQ(page.find("<section id=\"curves\">"), std::string::npos);  // nothing given for it
  // The best of a column is bold, and the paper's figure for TM at 130M stands beside it.
  EXPECT_NE(page.find("<td class=\"number best\">70.0 <small>± 1.0</small></td>"), std::string::npos);
  EXPECT_EQ(page.find("number best\">60.0"), std::string::npos);
  EXPECT_NE(page.find("43.5 <small>130M</small>"), std::string::npos);
  EXPECT_NE(page.find("43.3 <small>130M</small>"), std::string::npos);
  EXPECT_NE(page.find(">25</text>"), std::string::npos);
  // Recall: pairs in order on an axis of log2 from 2 to 8.
  EXPECT_EQ(count(page, "MQAR, sequences of 64 tokens</h4>"), 1u);
  EXPECT_NE(page.find("data-x=\"2 8\""), std::string::npos);
  EXPECT_EQ(count(page, "data-logarithmic-x>"), 1u);
  // What files say is text.
  EXPECT_EQ(page.find("<script>alert"), std::string::npos);
  EXPECT_NE(page.find("&lt;script&gt;alert(1)&lt;/script&gt;"), std::string::npos);
  EXPECT_EQ(page.find("<i>"), std::string::npos);
  EXPECT_EQ(page.find("tiny <b>"), std::string::npos);
  // Nothing to fetch.
  EXPECT_EQ(page.find("src="), std::string::npos);
  EXPECT_EQ(page.find("href=\"http"), std::string::npos);
  EXPECT_EQ(page.find("url(http"), std::string::npos);
  EXPECT_EQ(page.find("@import"), std::string::npos);
  // Thousand steps, four hundred points at most a curve.
  EXPECT_NE(page.find("mean of up to 3 steps"), std::string::npos);
  EXPECT_LT(page.size(), 300'000u);
}

TEST_F(Report, CurvesOfAnOlderFileHaveNoBands) {
  write("c/curve.json",
        R"({"model":"m","data":"d","dtype":"float32","windows":2,"length":4,"smooth":1,"curves":[
{"schedule":"linear","reference":true,"perplexity":2.0,"smoothed_perplexity":[4,3,2,1.5],"switches":[]},
{"schedule":"linear,attention@2","perplexity":2.5,"smoothed_perplexity":[4,3,2.5,2],"switches":[
 {"position":2,"from":"linear","to":"attention","excess":[{"begin":0,"end":16,"excess_loss":0.5,"standard_error":0.01}]}]}]})");
  const Sources sources = read_sources({place("c")});
  EXPECT_EQ(sources.curves[0].curves[1].line.switches, (std::vector<int64_t>{2}));
  const std::string page = report_html(sources, {});
  EXPECT_NE(page.find("+0.5000"), std::string::npos);
  EXPECT_EQ(page.find("class=\"band\""), std::string::npos);
}

TEST(Thinned, KeepsMeansAndTheNumberOfPointsSmall) {
  Points points;
  for (int i = 0; i < 1001; ++i) {
    points.x.push_back(i);
    points.y.push_back(2.0 * i);
  }
  size_t bucket = 0;
  const Points thin = thinned(points, 100, bucket);
  EXPECT_EQ(bucket, 11u);
  EXPECT_EQ(thin.x.size(), 91u);
  EXPECT_DOUBLE_EQ(thin.x[0], 5);
  EXPECT_DOUBLE_EQ(thin.y[0], 10);
  EXPECT_DOUBLE_EQ(thin.x.back(), (990 + 1000) / 2.0);
  EXPECT_EQ(thinned(points, 5000, bucket).x.size(), 1001u);
}

TEST(Texts, NumbersAsPeopleReadThem) {
  EXPECT_EQ(grouped(999), "999");
  EXPECT_EQ(grouped(1234567.4), "1,234,567");
  EXPECT_EQ(grouped(-1234), "-1,234");
  EXPECT_EQ(count_text(34'700'000), "34.7 million");
  EXPECT_EQ(bytes_text(1536), "1.5 KiB");
  EXPECT_EQ(metric_text("acc", 0.4123), "41.2");
  EXPECT_EQ(metric_text("ppl", 23.712), "23.71");
  EXPECT_EQ(metric_text("word_perplexity", 123456.0), "1.23e+05");
  EXPECT_EQ(metric_text("bits_per_byte", 1.23456), "1.235");
  EXPECT_EQ(error_text("ppl", 57.58, 1.9), "1.90");
  EXPECT_EQ(error_text("acc", 0.4, 0.0123), "1.2");
  EXPECT_EQ(metric_title("word_perplexity"), "word ppl");
  EXPECT_EQ(plural(1, "task"), "1 task");
  EXPECT_DOUBLE_EQ(median({5, 1, 3}), 3);
}

TEST(Paper, FiguresOfTheSameVariantModeAndNearestSize) {
  const std::vector<std::string> tm = {"attention", "ssd"}, tg = {"attention", "gated_delta"};
  EXPECT_EQ(paper_language(tm, "linear", 34.7e6)->value, 43.3);
  EXPECT_STREQ(paper_language(tm, "linear", 34.7e6)->size, "130M");
  EXPECT_EQ(paper_language(tg, "attention", 1.3e9)->value, 56.5);
  EXPECT_EQ(paper_language({"attention"}, "attention", 400e6)->value, 49.2);
  EXPECT_EQ(paper_language({"gated_delta"}, "linear", 800e6)->value, 54.2);
  EXPECT_FALSE(paper_language(tm, "every(4)", 1e8).has_value());
  EXPECT_FALSE(paper_language({}, "linear", 1e8).has_value());
  EXPECT_EQ(paper_retrieval(tm, "linear,attention@97.5%")->needle, 85.1);
  EXPECT_EQ(paper_retrieval(tm, "linear->attention")->retrieval, 43.9);
  EXPECT_EQ(paper_retrieval(tg, "attention,linear@query")->needle, 87.1);
  EXPECT_EQ(paper_retrieval(tm, "linear,attention@-64"), nullptr);
  EXPECT_EQ(paper_retrieval(tm, "linear,attention@97.5%,linear@generation"), nullptr);
}

TEST(JsonFields, NamesThePlace) {
  const Value value = formats::parse_json(R"({"a":{"b":[1,"x"]},"n":null,"d":2})", "f.json");
  const JsonFields fields(*value.as<Table>(), "f.json");
  EXPECT_EQ(fields.find("n"), nullptr);
  EXPECT_EQ(fields.number("d"), 2.0);
  EXPECT_EQ(error_of([&] { fields.object("a").numbers("b"); }),
            "f.json: a: b[1] is \"x\", expected a number");
  EXPECT_EQ(error_of([&] { fields.text("n"); }), "f.json: n is missing, expected a string");
}

}  // namespace
}  // namespace oryx::evaluation
