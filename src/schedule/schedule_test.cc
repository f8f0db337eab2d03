#include "schedule/schedule.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "base/error.h"
#include "schedule/training_draw.h"

namespace oryx::schedule {
namespace {

constexpr Mode A = Mode::attention, L = Mode::linear;

ModeSpans spans_of(std::string_view text, int64_t known, int64_t total) {
  return Schedule::parse(text).spans(known, total);
}

std::string usage_error(std::string_view text, int64_t known = -1) {
  try {
    const Schedule schedule = Schedule::parse(text);
    if (known >= 0) schedule.spans(known, known);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

TEST(Schedule, ExamplesOfTheInterface) {
  EXPECT_EQ(spans_of("attention", 10, 12), (ModeSpans{{0, 12, A}}));
  EXPECT_EQ(spans_of("linear,attention@97.5%", 1000, 1100), (ModeSpans{{0, 975, L}, {975, 1100, A}}));
  EXPECT_EQ(spans_of("linear,attention@-64,linear@generation", 100, 110),
            (ModeSpans{{0, 36, L}, {36, 100, A}, {100, 110, L}}));
  EXPECT_EQ(spans_of("every(4)", 600, 600), (ModeSpans{{0, 384, L}, {384, 512, A}, {512, 600, L}}));
  EXPECT_EQ(spans_of("every(2,chunk=3)", 7, 7), (ModeSpans{{0, 3, L}, {3, 6, A}, {6, 7, L}}));
  EXPECT_EQ(spans_of("every(2),chunk=3", 7, 7), spans_of("every(2, chunk = 3)", 7, 7));
  EXPECT_EQ(spans_of("every(1)", 300, 300), (ModeSpans{{0, 300, A}}));
}

TEST(Schedule, StartsResolve) {
  EXPECT_EQ(spans_of("linear@0, attention @ 5", 8, 8), (ModeSpans{{0, 5, L}, {5, 8, A}}));
  EXPECT_EQ(spans_of("linear,attention@33.3%", 10, 10), (ModeSpans{{0, 3, L}, {3, 10, A}}));
  EXPECT_EQ(spans_of("linear,attention@100%", 10, 11), (ModeSpans{{0, 10, L}, {10, 11, A}}));
  EXPECT_EQ(spans_of("linear,attention@-1", 10, 10), (ModeSpans{{0, 9, L}, {9, 10, A}}));
  // 0.29 · 100 is 28.999… in binary floating point; percents are exact.
  EXPECT_EQ(spans_of("linear,attention@29%", 100, 100), (ModeSpans{{0, 29, L}, {29, 100, A}}));
  EXPECT_EQ(spans_of("linear,linear@5", 8, 8), (ModeSpans{{0, 8, L}}));
}

TEST(Schedule, AStartPastTheEndIsNeverReached) {
  EXPECT_EQ(spans_of("linear,attention@512", 100, 200), (ModeSpans{{0, 200, L}}));
  EXPECT_EQ(spans_of("linear,attention@generation", 100, 100), (ModeSpans{{0, 100, L}}));
  EXPECT_EQ(spans_of("linear", 0, 0), ModeSpans{});
}

TEST(Schedule, ErrorsNameThePieceAndWhatWasExpected) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "is empty"},
      {"  ", "is empty"},
      {"atention", "\"atention\""},
      {"linear,", "no mode in \"\""},
      {"linear,attention", "no start in \"attention\""},
      {"linear@5", "starts at 5"},
      {"linear@0%", "starts at 0%"},
      {"linear@generation", "starts at generation"},
      {"linear,attention@", "at \"\""},
      {"linear,attention@x", "at \"x\""},
      {"linear,attention@1.5", "at \"1.5\""},
      {"linear,attention@-0", "at \"-0\""},
      {"linear,attention@+5", "at \"+5\""},
      {"linear,attention@99999999999999999999", "at \"99999999999999999999\""},
      {"linear,attention@100.1%", "0% to 100%"},
      {"linear,attention@-5%", "0% to 100%"},
      {"linear,attention@.%", "0% to 100%"},
      {"linear,attention@0", "backwards from linear to attention@0"},
      {"linear,attention@9,linear@9", "backwards from attention@9 to linear@9"},
      {"linear,attention@-5,linear@-6", "backwards from attention@-5 to linear@-6"},
      {"linear,attention@50%,linear@49.99%", "backwards from attention@50% to linear@49.99%"},
      {"linear,attention@generation,linear@generation", "backwards"},
      {"evry(4)", "no form \"evry\""},
      {"every(4", "closing"},
      {"every()", "no period"},
      {"every(0)", "no period"},
      {"every(4,5)", "no period"},
      {"every(4)x", "\"x\" after"},
      {"every(4,chunk=0)", "chunk=N"},
      {"every(4,chunk)", "chunk=N"},
      {"random(1.5)", "probability \"1.5\""},
      {"random(nan)", "probability \"nan\""},
      {"random()", "probability"},
      {"random(0.5,-1)", "seed \"-1\""},
      {"random(0.5,1,2)", "arguments"},
  };
  for (const auto& [text, part] : cases) {
    EXPECT_NE(usage_error(text).find(part), std::string::npos) << text << ": " << usage_error(text);
    EXPECT_NE(usage_error(text).find("expected"), std::string::npos) << text;
  }
}

TEST(Schedule, ErrorsOfLengthNameBothValues) {
  EXPECT_EQ(usage_error("linear,attention@8,linear@50%", 10),
            "schedule \"linear,attention@8,linear@50%\": linear@50% starts at token 5, which is not after "
            "attention@8 at token 8 (known length 10); expected starts that increase");
  EXPECT_NE(usage_error("linear,attention@-64", 10).find("-64 reaches back past the first of 10"),
            std::string::npos);
  EXPECT_NE(usage_error("linear,attention@-10", 10).find("token 0"), std::string::npos);
  EXPECT_THROW(Schedule::parse("linear").spans(5, 4), Error);
  EXPECT_THROW(Schedule::parse("linear").spans(-1, 4), Error);
}

TEST(Schedule, CanonicalTextIsAFixedPoint) {
  for (const char* text :
       {"attention", " linear@0 , attention @ 97.50% ", "every(4)", "every( 4 ),chunk=64", "random(0.25)",
        "random(0.25,7,chunk=128)", "linear,attention@-64,linear@generation"}) {
    const Schedule schedule = Schedule::parse(text);
    EXPECT_EQ(Schedule::parse(schedule.text()).text(), schedule.text());
    EXPECT_EQ(Schedule::parse(schedule.text()).spans(999, 2000), schedule.spans(999, 2000)) << text;
  }
  EXPECT_EQ(Schedule::parse("random(.25)").text(), "random(0.25,0)");
  EXPECT_EQ(Schedule::parse("every(4),chunk=64").text(), "every(4,chunk=64)");
}

TEST(Schedule, RandomFollowsItsProbabilityAndSeed) {
  EXPECT_NEAR(attention_share(spans_of("random(0.25,7,chunk=1)", 40000, 40000)), 0.25, 0.01);
  EXPECT_EQ(attention_share(spans_of("random(0)", 4000, 4000)), 0);
  EXPECT_EQ(attention_share(spans_of("random(1)", 4000, 4000)), 1);
  EXPECT_NE(spans_of("random(0.5,1)", 9999, 9999), spans_of("random(0.5,2)", 9999, 9999));
  // The draw of a token does not depend on the length.
  EXPECT_EQ(spans_of("random(0.5,1)", 10, 5000), cut(spans_of("random(0.5,1)", 5000, 9999), 0, 5000));
}

void check_well_formed(const ModeSpans& spans, int64_t begin, int64_t end) {
  RC_ASSERT(spans.empty() == (begin == end));
  if (spans.empty()) return;
  RC_ASSERT(spans.front().begin == begin);
  RC_ASSERT(spans.back().end == end);
  for (size_t i = 0; i < spans.size(); ++i) {
    RC_ASSERT(spans[i].begin < spans[i].end);
    if (i > 0) RC_ASSERT(spans[i].begin == spans[i - 1].end && spans[i].mode != spans[i - 1].mode);
  }
}

TEST(ScheduleProperties, AnySortedStartsCoverTheSequence) {
  EXPECT_TRUE(rc::check([] {
    auto starts = *rc::gen::unique<std::vector<int64_t>>(rc::gen::inRange<int64_t>(1, 400));
    std::sort(starts.begin(), starts.end());
    const int64_t known = *rc::gen::inRange<int64_t>(0, 300);
    const int64_t total = known + *rc::gen::inRange<int64_t>(0, 100);
    std::string text = "linear";
    Mode mode = L;
    std::vector<Mode> meaning(total, L);
    for (int64_t start : starts) {
      mode = *rc::gen::element(A, L);
      text += fmt::format(",{}@{}", mode_name(mode), start);
      for (int64_t t = start; t < total; ++t) meaning[t] = mode;
    }
    const ModeSpans spans = Schedule::parse(text).spans(known, total);
    check_well_formed(spans, 0, total);
    for (const ModeSpan& span : spans) {
      for (int64_t t = span.begin; t < span.end; ++t) RC_ASSERT(meaning[t] == span.mode);
    }
  }));
}

TEST(ScheduleProperties, PiecesJoinToTheWhole) {
  EXPECT_TRUE(rc::check([] {
    const int64_t total = *rc::gen::inRange<int64_t>(1, 500);
    const ModeSpans whole = draw({0.5, 7, false}, total, *rc::gen::arbitrary<uint64_t>(), 0, 0);
    check_well_formed(whole, 0, total);
    const int64_t middle = *rc::gen::inRange<int64_t>(0, total + 1);
    ModeSpans joined = cut(whole, 0, middle);
    check_well_formed(joined, 0, middle);
    const ModeSpans tail = cut(whole, middle, total);
    check_well_formed(tail, middle, total);
    RC_ASSERT(attention_tokens(joined) + attention_tokens(tail) == attention_tokens(whole));
    joined.insert(joined.end(), tail.begin(), tail.end());
    RC_ASSERT(merge(joined) == whole);
    RC_ASSERT_THROWS_AS(cut(whole, middle, total + 1), Error);
  }));
}

TEST(ScheduleProperties, ArbitraryTextParsesOrThrowsUsageError) {
  EXPECT_TRUE(rc::check([] {
    const auto text = *rc::gen::container<std::string>(
        rc::gen::element('a', 't', '@', ',', '1', '-', '%', '(', ')', '.', ' '));
    const std::string prefix =
        *rc::gen::element<std::string>("", "linear,attention@", "every(", "random(", "linear");
    try {
      const Schedule schedule = Schedule::parse(prefix + text);
      check_well_formed(schedule.spans(50, 70), 0, 70);
    } catch (const UsageError&) {
    }
  }));
}

TEST(Spans, MergeRejectsGaps) {
  EXPECT_THROW(merge({{0, 3, A}, {4, 5, L}}), Error);
  EXPECT_THROW(merge({{0, 3, A}, {2, 5, L}}), Error);
  EXPECT_THROW(merge({{3, 0, A}}), Error);
  EXPECT_EQ(merge({{0, 3, A}, {3, 3, L}, {3, 5, A}}), (ModeSpans{{0, 5, A}}));
}

TEST(TrainingDraw, IsAPureFunctionAndFollowsItsProbability) {
  const TrainingDraw options;
  int64_t attention = 0, tokens = 0;
  for (uint64_t sequence = 0; sequence < 2000; ++sequence) {
    const ModeSpans spans = draw(options, 2048, 1, 5, sequence);
    EXPECT_EQ(spans, draw(options, 2048, 1, 5, sequence));
    for (const ModeSpan& span : spans) EXPECT_EQ(span.begin % 128, 0);
    attention += attention_tokens(spans);
    tokens += total_tokens(spans);
  }
  EXPECT_NEAR(static_cast<double>(attention) / static_cast<double>(tokens), 0.25, 0.01);
  EXPECT_NE(draw(options, 20000, 1, 5, 0), draw(options, 20000, 2, 5, 0));
  EXPECT_NE(draw(options, 20000, 1, 5, 0), draw(options, 20000, 1, 6, 0));
  EXPECT_NE(draw(options, 20000, 1, 5, 0), draw(options, 20000, 1, 5, 1));
}

TEST(TrainingDraw, PerSequenceIsOneSpan) {
  int attention = 0;
  for (uint64_t sequence = 0; sequence < 4000; ++sequence) {
    const ModeSpans spans = draw({0.25, 128, true}, 1000, 3, 0, sequence);
    ASSERT_EQ(spans.size(), 1u);
    attention += spans[0].mode == A;
  }
  EXPECT_NEAR(attention / 4000.0, 0.25, 0.03);
  EXPECT_TRUE(draw({0.25, 128, true}, 0, 3, 0, 0).empty());
}

TEST(TrainingDraw, RejectsNonsense) {
  EXPECT_THROW(draw({-0.1, 128, false}, 10, 0, 0, 0), Error);
  EXPECT_THROW(draw({1.1, 128, false}, 10, 0, 0, 0), Error);
  EXPECT_THROW(draw({0.5, 0, false}, 10, 0, 0, 0), Error);
}

}  // namespace
}  // namespace oryx::schedule
