// UTF-8 and the Unicode properties that splitting and normalising need, in the Unicode version of the
// `tokenizers` package (make_unicode_tables.py), so that no character is split differently.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace oryx::tokenizer {

// kOther: marks, punctuation, symbols, controls, unassigned, and bytes that are not UTF-8.
enum class CharacterClass : uint8_t { kOther, kLetter, kNumber, kSpace };

// The `code` of a byte that is not part of a valid UTF-8 sequence.
inline constexpr uint32_t kInvalidByte = 0x110000;

struct Character {
  uint32_t code;
  uint32_t size;  // bytes
};

// The character at `at` < `end`. Overlong forms, surrogates and unfinished sequences are invalid bytes, one
// by one.
inline Character decode_character(const char* at, const char* end) {
  const auto byte = [at](int i) { return static_cast<uint32_t>(static_cast<uint8_t>(at[i])); };
  const auto continues = [&](int i) { return i < end - at && (byte(i) & 0xC0) == 0x80; };
  const uint32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xE0) {
    if (lead >= 0xC2 && continues(1)) return {(lead & 0x1F) << 6 | (byte(1) & 0x3F), 2};
  } else if (lead < 0xF0) {
    if (continues(1) && continues(2)) {
      const uint32_t code = (lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
      if (code >= 0x800 && (code < 0xD800 || code > 0xDFFF)) return {code, 3};
    }
  } else if (lead < 0xF5) {
    if (continues(1) && continues(2) && continues(3)) {
      const uint32_t code =
          (lead & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
      if (code >= 0x10000 && code <= 0x10FFFF) return {code, 4};
    }
  }
  return {kInvalidByte, 1};
}

void append_utf8(std::string& text, uint32_t code);

// Of a code point or kInvalidByte.
CharacterClass character_class(uint32_t code);

// How many bytes of `text` come before a sequence that its end cuts off (text.size() when none is cut).
size_t complete_prefix(std::string_view text);

// `text` with U+FFFD for each byte that is not part of a valid sequence, for places that take only UTF-8.
std::string replace_invalid_utf8(std::string_view text);

// Unicode normalization form C. Bytes that are not UTF-8 stay as they are and combine with nothing.
// Returns `text` itself when it is normal already, else a view of `storage`.
std::string_view normalize_nfc(std::string_view text, std::string& storage);

}  // namespace oryx::tokenizer
