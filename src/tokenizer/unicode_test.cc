#include "tokenizer/unicode.h"

#include <gtest/gtest.h>

#include "tokenizer/test_tokenizer.h"

namespace oryx::tokenizer {
namespace {

Character first(std::string_view text) { return decode_character(text.data(), text.data() + text.size()); }

TEST(Unicode, EveryCodePointDecodesToItself) {
  for (uint32_t code = 0; code < kInvalidByte; ++code) {
    std::string text;
    append_utf8(text, code);
    const Character character = first(text);
    if (code >= 0xD800 && code < 0xE000) {
      ASSERT_EQ(character.code, kInvalidByte) << code;
    } else {
      ASSERT_EQ(character.code, code);
      ASSERT_EQ(character.size, text.size());
      for (size_t cut = 1; cut < text.size(); ++cut) {
        ASSERT_EQ(first(text.substr(0, cut)).code, kInvalidByte) << code;
        ASSERT_EQ(complete_prefix("ab" + text.substr(0, cut)), 2u) << code;
      }
      ASSERT_EQ(complete_prefix(text), text.size()) << code;
    }
  }
}

TEST(Unicode, BrokenSequencesAreSingleBytes) {
  for (const char* text :
       {"\x80", "\xbf", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf",
        "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "\xc3(", "\xe4\xb8("}) {
    EXPECT_EQ(first(text).code, kInvalidByte) << text;
    EXPECT_EQ(first(text).size, 1u) << text;
  }
  EXPECT_EQ(replace_invalid_utf8("a\xc3(\xe4\xb8\xad\xff"), "a\uFFFD(\u4e2d\uFFFD");
  // What can no longer become a character does not wait for more.
  for (const char* text :
       {"a\x80", "a\xc0", "a\xe0\x80", "a\xed\xa0", "a\xf0\x80", "a\xf4\x90", "a\xf8", "\x80\x80\x80"}) {
    EXPECT_EQ(complete_prefix(text), std::string_view(text).size()) << text;
  }
}

TEST(Unicode, Classes) {
  EXPECT_EQ(character_class('a'), CharacterClass::kLetter);
  EXPECT_EQ(character_class(0x4E2D), CharacterClass::kLetter);
  EXPECT_EQ(character_class(0x105C0), CharacterClass::kLetter);  // Todhri, Unicode 16
  EXPECT_EQ(character_class(0xBD), CharacterClass::kNumber);
  EXPECT_EQ(character_class(0x3000), CharacterClass::kSpace);
  EXPECT_EQ(character_class(0x180E), CharacterClass::kOther);
  EXPECT_EQ(character_class(0x301), CharacterClass::kOther);
  EXPECT_EQ(character_class(kInvalidByte), CharacterClass::kOther);
}

std::string nfc(std::string_view text) {
  std::string storage;
  return std::string(normalize_nfc(text, storage));
}

TEST(Unicode, NormalFormC) {
  EXPECT_EQ(nfc("plain"), "plain");
  EXPECT_EQ(nfc("e\u0301"), "\u00e9");
  EXPECT_EQ(nfc("a\u0301\u0323"), "\u1ea1\u0301");  // marks are put in order, then composed
  EXPECT_EQ(nfc("\u1e0b\u0323"), "\u1e0d\u0307");   // a composed letter is taken apart first
  EXPECT_EQ(nfc("\u212b"), "\u00c5");               // singleton
  EXPECT_EQ(nfc("\u0958"), "\u0915\u093c");         // excluded from composition
  EXPECT_EQ(nfc("\u1112\u1161\u11ab"), "\ud55c");   // Hangul
  EXPECT_EQ(nfc("\uac00\u11a8"), "\uac01");
  EXPECT_EQ(nfc("\u0301e"), "\u0301e");                  // nothing before the mark
  EXPECT_EQ(nfc("e\xff\u0301\xc3"), "e\xff\u0301\xc3");  // a broken byte combines with nothing
}

TEST(Unicode, NormalFormCIsIdempotentAndKeepsItsInput) {
  EXPECT_TRUE(rc::check([] {
    const std::string text = *hard_text();
    const std::string once = nfc(text);
    RC_ASSERT(nfc(once) == once);
  }));
  std::string storage = "untouched";
  const std::string_view normal = "\u00e9\u4e2d";
  EXPECT_EQ(normalize_nfc(normal, storage).data(), normal.data());
}

TEST(Unicode, ManyMarksAreSortedInNLogN) {
  std::string marks = "a";
  for (int i = 0; i < 300'000; ++i) marks += "\u0301\u0327\u0345";
  EXPECT_EQ(nfc(marks).size(),
            marks.size() - 1);  // one acute goes into the letter
}

}  // namespace
}  // namespace oryx::tokenizer
