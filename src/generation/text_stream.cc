#include "generation/text_stream.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "base/error.h"

namespace oryx::generation {

namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

struct Character {
  enum class Kind { valid, invalid, incomplete } kind;
  size_t size;  // bytes it takes; for invalid ones the maximal subpart that one U+FFFD replaces
};

// The first character of `bytes`, which are not empty (Unicode 15, table 3-7).
Character first_character(std::string_view bytes) {
  const auto at = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t lead = at(0);
  if (lead < 0x80) return {Character::Kind::valid, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Character::Kind::invalid, 1};
  const size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  for (size_t i = 1; i < size; ++i) {
    if (i == bytes.size()) return {Character::Kind::incomplete, i};
    uint8_t low = 0x80, high = 0xBF;
    if (i == 1 && lead == 0xE0) low = 0xA0;   // no overlong form
    if (i == 1 && lead == 0xED) high = 0x9F;  // no surrogate
    if (i == 1 && lead == 0xF0) low = 0x90;
    if (i == 1 && lead == 0xF4) high = 0x8F;  // nothing past U+10FFFF
    if (at(i) < low || at(i) > high) return {Character::Kind::invalid, i};
  }
  return {Character::Kind::valid, size};
}

}  // namespace

TextStream::TextStream(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) {
    if (stop.empty()) fail_usage("a stop string is empty: expected at least one character");
  }
}

size_t TextStream::match_length() const {
  size_t longest = 0;
  for (const std::string& stop : stops_) {
    if (pending_.ends_with(stop)) longest = std::max(longest, stop.size());
  }
  return longest;
}

size_t TextStream::held_length() const {
  size_t longest = 0;
  for (const std::string& stop : stops_) {
    for (size_t size = std::min(stop.size() - 1, pending_.size()); size > longest; --size) {
      if (pending_.ends_with(std::string_view(stop).substr(0, size))) {
        longest = size;
        break;
      }
    }
  }
  return longest;
}

std::vector<TextStream::Piece> TextStream::push(std::string_view bytes, int tag) {
  std::vector<Piece> pieces;
  if (stopped_) return pieces;
  // Byte by byte, so that the outcome does not depend on how the text was cut into tokens.
  for (const char byte : bytes) {
    pending_ += byte;
    tags_.push_back(tag);
    if (const size_t match = match_length(); match > 0) {
      release(pending_.size() - match, true, pieces);
      stopped_ = true;
      return pieces;
    }
  }
  release(pending_.size() - held_length(), false, pieces);
  return pieces;
}

std::vector<TextStream::Piece> TextStream::finish() {
  std::vector<Piece> pieces;
  if (!stopped_) release(pending_.size(), true, pieces);
  return pieces;
}

void TextStream::release(size_t size, bool final, std::vector<Piece>& pieces) {
  size_t taken = 0;
  while (taken < size) {
    const auto character = first_character(std::string_view(pending_).substr(taken, size - taken));
    if (character.kind == Character::Kind::incomplete && !final) break;
    const std::string_view text = character.kind == Character::Kind::valid
                                      ? std::string_view(pending_).substr(taken, character.size)
                                      : kReplacement;
    if (pieces.empty() || pieces.back().tag != tags_[taken]) pieces.push_back({"", tags_[taken]});
    pieces.back().text += text;
    taken += character.size;
  }
  pending_.erase(0, taken);
  tags_.erase(tags_.begin(), tags_.begin() + static_cast<std::ptrdiff_t>(taken));
}

}  // namespace oryx::generation
