// Regular expressions of tokenizer.json by PCRE2, on any bytes.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

struct pcre2_real_code_8;

namespace oryx::tokenizer {

class Regex {
 public:
  // Throws Error when the pattern does not compile. Unicode properties are those of the installed PCRE2,
  // except that \s is White_Space as in the package (PCRE2's own \s also takes U+180E).
  explicit Regex(const std::string& pattern);
  ~Regex();
  Regex(const Regex&) = delete;
  Regex& operator=(const Regex&) = delete;

  // Calls use(begin, end) for each match that is not empty, left to right. A byte that is not UTF-8 matches
  // like U+FFFD. Throws Error when a match needs more memory or backtracking than PCRE2 allows.
  void for_each_match(std::string_view text, const std::function<void(size_t, size_t)>& use) const;

 private:
  void for_each_valid(std::string_view text, const std::function<void(size_t, size_t)>& use) const;

  std::string pattern_;
  pcre2_real_code_8* code_;
};

}  // namespace oryx::tokenizer
