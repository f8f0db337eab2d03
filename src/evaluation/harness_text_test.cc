#include "evaluation/harness_text.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "evaluation/schedule_form.h"

namespace oryx::evaluation {
namespace {

TEST(EncodePair, MovesBlanksToTheContinuation) {
  const auto bytes = tokenizer::Tokenizer::load("bytes");
  using Ids = std::vector<int64_t>;
  const EncodedPair plain = encode_pair(*bytes, "ab", " c");
  EXPECT_EQ(plain.context, (Ids{'a', 'b'}));
  EXPECT_EQ(plain.continuation, (Ids{' ', 'c'}));
  const EncodedPair trailing = encode_pair(*bytes, "ab \n", "c");
  EXPECT_EQ(trailing.context, (Ids{'a', 'b'}));
  EXPECT_EQ(trailing.continuation, (Ids{' ', '\n', 'c'}));
  const EncodedPair empty = encode_pair(*bytes, "", "c");
  EXPECT_EQ(empty.context, (Ids{256}));
  EXPECT_EQ(empty.continuation, (Ids{'c'}));
  EXPECT_EQ(encode_pair(*bytes, " ", "c").context, (Ids{256}));
}

TEST(HarnessText, CountsWordsAsPythonSplits) {
  EXPECT_EQ(count_words("a b"), 2);
  EXPECT_EQ(count_words(" a  b\n"), 4);  // an empty word at either end
  EXPECT_EQ(count_words(""), 1);
  EXPECT_EQ(count_words("a\u00A0b\u2003c"), 3);
  EXPECT_EQ(count_characters("a\u00E9\u6F22"), 3);
  EXPECT_EQ(strip_blanks(" \u00A0a b\x1F\n"), "a b");
}

TEST(HarnessText, CutsPagesAtTitlesOfOneLevel) {
  const auto pages = wikitext_pages("\n = A = \r\n text \r\n = = Part = = \n more \n = B ( film ) = \n end");
  ASSERT_EQ(pages.size(), 2);
  EXPECT_EQ(pages[0], " = A = \n text \n = = Part = = \n more ");
  EXPECT_EQ(pages[1], " = B ( film ) = \n end");
}

TEST(HarnessText, UndoesTheSpacingOfWikitext) {
  EXPECT_EQ(wikitext_detokenize(
                "boys ' toy 's , ( one two ) [ x ] { y } 1 @,@ 000 @-@ 2 @.@ 5 : a ; b ! c ? d . e"),
            "boys'toy's, (one two) [x] {y} 1,000-2.5: a; b! c? d. e");
  EXPECT_EQ(wikitext_detokenize("say \" so it is \" and ' no ' then"), "say \"so it is\" and 'no' then");
  EXPECT_EQ(wikitext_detokenize(" = = = Deep = = = \n 5 \u00B0 C N x "), " === Deep ===\n5\u00B0C 1 x ");
  EXPECT_EQ(wikitext_detokenize("open ( and never closed"), "open ( and never closed");
}

TEST(RollingWindows, PredictEveryTokenOnceWithTheMostContext) {
  const auto windows = rolling_windows(10, 4);
  ASSERT_EQ(windows.size(), 3);
  EXPECT_EQ(windows[0].begin, -1);
  EXPECT_EQ(windows[1].begin, 3);
  EXPECT_EQ(windows[2].begin, 5);
  int64_t next = 0;
  for (const Window& window : windows) {
    EXPECT_EQ(window.first, next);
    EXPECT_EQ(window.end - window.begin - 1, 4);  // tokens read
    next = window.end;
  }
  EXPECT_EQ(next, 10);
}

TEST(ContainsAnswer, IgnoresCaseAndTakesMarksLiterally) {
  EXPECT_TRUE(contains_answer(" in PARIS, France", {"rome", "Paris"}));
  EXPECT_TRUE(contains_answer("costs $5.00 (about)", {"$5.00 (ABOUT)"}));
  EXPECT_FALSE(contains_answer("costs 5x00", {"5.00"}));
  EXPECT_TRUE(contains_answer("\u00C9COLE", {"\u00E9cole"}));
  EXPECT_FALSE(contains_answer("", {"a"}));
  EXPECT_TRUE(contains_answer("a\\sb", {"a\\sb"}));
  EXPECT_FALSE(contains_answer("a b", {"a\\sb"}));
}

TEST(ScheduleForm, FillsInTheQueryAndTheSplit) {
  using schedule::Mode;
  const schedule::ModeSpans halves{{0, 6, Mode::linear}, {6, 10, Mode::attention}};
  EXPECT_EQ(ScheduleForm::parse("linear,attention@query").spans(10, 6), halves);
  const ScheduleForm form = ScheduleForm::parse("linear->attention");
  EXPECT_EQ(form.text(), "linear->attention");
  EXPECT_EQ(form.split_at("60%").spans(10, std::nullopt), halves);
  EXPECT_EQ(form.split_at("query").text(), "linear,attention@query");
  EXPECT_EQ(ScheduleForm::parse("attention").split_at("query").text(), "attention");
  EXPECT_THROW(form.split_at("query").spans(10, std::nullopt), UsageError);
  for (const char* wrong :
       {"linear->", "->attention", "linear->attention->linear", "linear@query", "x->attention"}) {
    EXPECT_THROW(ScheduleForm::parse(wrong), UsageError) << wrong;
  }
}

}  // namespace
}  // namespace oryx::evaluation
