#include "tokenizer/added_tokens.h"

#include <algorithm>
#include <cstring>

#include "tokenizer/unicode.h"

namespace oryx::tokenizer {

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::erase_if(tokens_, [](const AddedToken& token) { return token.content.empty(); });
  std::sort(tokens_.begin(), tokens_.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.content < b.content; });
  for (const AddedToken& token : tokens_) starts_[static_cast<uint8_t>(token.content[0])] = true;
  if (std::count(starts_.begin(), starts_.end(), true) == 1) {
    only_start_ = static_cast<uint8_t>(tokens_[0].content[0]);
  }
}

size_t AddedTokenMatcher::next_candidate(std::string_view text, size_t at) const {
  if (tokens_.empty() || at >= text.size()) return text.size();
  if (only_start_ >= 0) {
    const void* found = std::memchr(text.data() + at, only_start_, text.size() - at);
    return found == nullptr ? text.size() : static_cast<const char*>(found) - text.data();
  }
  while (at < text.size() && !starts_[static_cast<uint8_t>(text[at])]) ++at;
  return at;
}

const AddedToken* AddedTokenMatcher::longest_at(std::string_view text, size_t at) const {
  // Narrows the sorted tokens byte by byte; one that ends here comes first of those left.
  auto first = tokens_.begin(), last = tokens_.end();
  const AddedToken* longest = nullptr;
  for (size_t depth = 0; at + depth < text.size(); ++depth) {
    const uint8_t byte = static_cast<uint8_t>(text[at + depth]);
    const auto byte_of = [depth](const AddedToken& token) {
      return static_cast<uint8_t>(token.content[depth]);
    };
    first = std::partition_point(first, last, [&](const AddedToken& token) { return byte_of(token) < byte; });
    last = std::partition_point(first, last, [&](const AddedToken& token) { return byte_of(token) == byte; });
    if (first == last) break;
    if (first->content.size() == depth + 1) {
      longest = &*first;
      while (first != last && first->content.size() == depth + 1) ++first;
      if (first == last) break;
    }
  }
  return longest;
}

size_t AddedTokenMatcher::space_begin(std::string_view text, size_t end) {
  while (end > 0) {
    size_t begin = end - 1;
    while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
    const Character character = decode_character(text.data() + begin, text.data() + end);
    if (begin + character.size != end || character_class(character.code) != CharacterClass::kSpace) break;
    end = begin;
  }
  return end;
}

size_t AddedTokenMatcher::space_end(std::string_view text, size_t begin) {
  while (begin < text.size()) {
    const Character character = decode_character(text.data() + begin, text.data() + text.size());
    if (character_class(character.code) != CharacterClass::kSpace) break;
    begin += character.size;
  }
  return begin;
}

}  // namespace oryx::tokenizer
