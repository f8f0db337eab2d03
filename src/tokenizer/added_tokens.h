// Finds the added tokens of a tokenizer.json (special tokens among them) in text, before it is split.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace oryx::tokenizer {

struct AddedToken {
  int32_t id;
  std::string content;
  bool special = false;
  bool normalized = false;  // is looked for in the normalised text
  bool strip_left = false;  // takes the white space before it
  bool strip_right = false;
};

// Matches like the package: leftmost, then longest, without overlap.
class AddedTokenMatcher {
 public:
  AddedTokenMatcher() = default;
  // Matches the tokens' `content`; empty ones are ignored.
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);

  bool empty() const { return tokens_.empty(); }

  // Calls use(std::string_view text, const AddedToken* token) for each piece in order: `token` is null for
  // text between matches. Without `allow_special` a match of a special token stays text.
  template <typename Use>
  void for_each(std::string_view text, bool allow_special, Use&& use) const {
    size_t done = 0;
    for (size_t at = 0; (at = next_candidate(text, at)) < text.size();) {
      const AddedToken* token = longest_at(text, at);
      if (token == nullptr) {
        ++at;
        continue;
      }
      size_t begin = at, end = at + token->content.size();
      at = end;
      if (token->special && !allow_special) continue;
      if (token->strip_left) begin = std::max(done, space_begin(text, begin));
      if (token->strip_right) end = space_end(text, end);
      if (begin > done) use(text.substr(done, begin - done), nullptr);
      use(text.substr(begin, end - begin), token);
      done = end;
      // The package goes on matching right after the token's text, even inside spaces it has just taken.
    }
    if (done < text.size()) use(text.substr(done), nullptr);
  }

 private:
  // The first position at or after `at` whose byte starts some token.
  size_t next_candidate(std::string_view text, size_t at) const;
  const AddedToken* longest_at(std::string_view text, size_t at) const;
  static size_t space_begin(std::string_view text, size_t end);
  static size_t space_end(std::string_view text, size_t begin);

  std::vector<AddedToken> tokens_;  // by content
  std::array<bool, 256> starts_{};
  int only_start_ = -1;  // the byte that all tokens start with, if there is one
};

}  // namespace oryx::tokenizer
