#include "generation/text_stream.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "base/error.h"

namespace oryx::generation {
namespace {

using Piece = TextStream::Piece;

std::string text_of(const std::vector<Piece>& pieces) {
  std::string text;
  for (const Piece& piece : pieces) text += piece.text;
  return text;
}

std::string stream(const std::vector<std::string>& parts, std::vector<std::string> stops) {
  TextStream text(std::move(stops));
  std::string shown;
  for (const std::string& part : parts) shown += text_of(text.push(part, 0));
  return shown + text_of(text.finish());
}

TEST(TextStream, StopsAcrossTokens) {
  EXPECT_EQ(stream({"Hello", " wo", "rld", "!"}, {"world"}), "Hello ");
  EXPECT_EQ(stream({"aab", "aab", "aac"}, {"aabaac"}), "aab");
  EXPECT_EQ(stream({"a wo", "rd"}, {"world"}), "a word");  // held back, then shown
  EXPECT_EQ(stream({"one", "two"}, {"one"}), "");
  EXPECT_EQ(stream({"xabc"}, {"abcd", "bc"}), "xa");  // the first to be completed
  EXPECT_EQ(stream({"xabc"}, {"c", "abc"}), "x");     // of two completed together the longest
}

TEST(TextStream, HoldsBackOnlyWhatMayBeAStop) {
  TextStream text({"\nUser:"});
  EXPECT_EQ(text_of(text.push("Yes.\nU", 0)), "Yes.");
  EXPECT_EQ(text_of(text.push("nless", 0)), "\nUnless");
  EXPECT_EQ(text_of(text.push("\nUser", 0)), "");
  EXPECT_FALSE(text.stopped());
  EXPECT_EQ(text_of(text.push(": next", 0)), "");
  EXPECT_TRUE(text.stopped());
  EXPECT_EQ(text_of(text.push("more", 0)), "");
  EXPECT_EQ(text_of(text.finish()), "");
}

TEST(TextStream, WholeCharactersOnly) {
  TextStream text;
  EXPECT_EQ(text_of(text.push("a\xE2\x82", 0)), "a");
  EXPECT_EQ(text_of(text.push("\xAC", 0)), "€");
  EXPECT_EQ(text_of(text.push("\xF0\x9F", 0)), "");
  EXPECT_EQ(text_of(text.finish()), "\uFFFD");
  // Overlong, surrogate, past the last code point, stray continuation: never passed on.
  EXPECT_EQ(stream({"\xC0\xAF|\xED\xA0\x80|\xF4\x90\x80\x80|\x80"}, {}),
            "\uFFFD\uFFFD|\uFFFD\uFFFD\uFFFD|\uFFFD\uFFFD\uFFFD\uFFFD|\uFFFD");
  // One replacement for the start of a character that never came.
  EXPECT_EQ(stream({"\xE2\x82z"}, {}), "\uFFFDz");
  EXPECT_EQ(stream({"\xE2\x82", "|"}, {"|"}), "\uFFFD");
}

TEST(TextStream, TagsFollowTheFirstByte) {
  TextStream text({"##"});
  EXPECT_EQ(text.push("ab#", 1), (std::vector<Piece>{{"ab", 1}}));
  EXPECT_EQ(text.push("c\xC3", 2), (std::vector<Piece>{{"#", 1}, {"c", 2}}));
  EXPECT_EQ(text.push("\xA9!", 3), (std::vector<Piece>{{"é", 2}, {"!", 3}}));
}

TEST(TextStream, CutsDoNotMatter) {
  EXPECT_TRUE(rc::check([] {
    const auto letters = rc::gen::element<std::string>("a", "b", "ab", "é", "\xE2\x82", "\xAC", "€");
    const auto parts = *rc::gen::container<std::vector<std::string>>(letters);
    const auto stops = *rc::gen::container<std::vector<std::string>>(
        *rc::gen::inRange<size_t>(0, 3),
        rc::gen::element<std::string>("ab", "ba", "aab", "bab", "éa", "€", "abab"));
    std::string whole, single;
    std::vector<std::string> bytes;
    for (const std::string& part : parts) {
      whole += part;
      for (const char byte : part) bytes.emplace_back(1, byte);
    }
    const std::string shown = stream({whole}, stops);
    RC_ASSERT(shown == stream(parts, stops));
    RC_ASSERT(shown == stream(bytes, stops));
    for (const std::string& stop : stops) RC_ASSERT(shown.find(stop) == std::string::npos);
  }));
}

TEST(TextStream, RefusesAnEmptyStop) { EXPECT_THROW(TextStream({"a", ""}), UsageError); }

}  // namespace
}  // namespace oryx::generation
