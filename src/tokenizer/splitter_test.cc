#include "tokenizer/splitter.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tokenizer/test_tokenizer.h"

namespace oryx::tokenizer {
namespace {

using Pieces = std::vector<std::string>;

constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
const std::string kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
    R"(\s*[\r\n]+|\s+(?!\S)|\s+)";
const std::string kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|)"
    R"(\s*[\r\n]+|\s+(?!\S)|\s+)";

Pieces split(const Splitter& splitter, std::string_view text) {
  Pieces pieces;
  splitter.for_each(text, [&](std::string_view piece) { pieces.emplace_back(piece); });
  return pieces;
}

TEST(Splitter, Examples) {
  const Splitter gpt2 = Splitter::gpt2(), llama3 = Splitter::pattern(kLlama3),
                 qwen2 = Splitter::pattern(kQwen2);
  EXPECT_EQ(split(gpt2, "It's  12345 o'clock!!\n\n x"),
            (Pieces{"It", "'s", " ", " 12345", " o", "'", "clock", "!!", "\n\n", " x"}));
  EXPECT_EQ(split(llama3, "It'S  12345 o'clock!!\n\n x"),
            (Pieces{"It", "'S", " ", " ", "123", "45", " o", "'clock", "!!\n\n", " x"}));
  EXPECT_EQ(split(qwen2, "a 12\r\n\tb"), (Pieces{"a", " ", "1", "2", "\r\n", "\tb"}));
  EXPECT_EQ(split(gpt2, "a\xff\xc3 \xff\u3000"), (Pieces{"a", "\xff\xc3", " \xff", "\u3000"}));
  EXPECT_EQ(split(gpt2, ""), Pieces{});
}

TEST(Splitter, KnownPatternsNeedNoRegex) {
  EXPECT_TRUE(Splitter::pattern(kGpt2).is_hand_written());
  EXPECT_TRUE(Splitter::pattern(kLlama3).is_hand_written());
  EXPECT_TRUE(Splitter::pattern(kQwen2).is_hand_written());
  EXPECT_FALSE(Splitter::pattern("x").is_hand_written());
}

TEST(Splitter, HandWrittenEqualsTheRegularExpression) {
  for (const std::string& pattern : {std::string(kGpt2), kLlama3, kQwen2}) {
    const Splitter by_hand = Splitter::pattern(pattern), by_regex = Splitter::general(pattern);
    EXPECT_TRUE(rc::check(pattern, [&] {
      const std::string text = *hard_text();
      const Pieces pieces = split(by_hand, text);
      RC_ASSERT(pieces == split(by_regex, text));
      std::string together;
      for (const std::string& piece : pieces) together += piece;
      RC_ASSERT(together == text);
    }));
  }
}

TEST(Splitter, GapsBetweenMatchesArePieces) {
  EXPECT_EQ(split(Splitter::general("b+|"), "abbcb"), (Pieces{"a", "bb", "c", "b"}));
  EXPECT_EQ(split(Splitter::general("b"),
                  "\xff"
                  "b\xe4\xb8"
                  "b"),
            (Pieces{"\xff", "b", "\xe4\xb8", "b"}));
}

TEST(Splitter, LongRunsAreLinear) {
  for (const std::string& pattern : {std::string(kGpt2), kLlama3, kQwen2, "(?:" + kLlama3 + ")"}) {
    const Splitter splitter = Splitter::pattern(pattern);
    for (const char* unit : {" ", "a", "1", "!", "\n", "'", " \n", "\xff", "\u3000"}) {
      std::string text;
      while (text.size() < 1 << 20) text += unit;
      size_t bytes = 0;
      splitter.for_each(text, [&](std::string_view piece) { bytes += piece.size(); });
      EXPECT_EQ(bytes, text.size());
    }
  }
}

TEST(Splitter, BadPatternIsNamed) {
  try {
    Splitter::pattern("a(b");
    FAIL() << "expected an Error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("split pattern 'a(b'"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace oryx::tokenizer
