// Pre-tokenisation: cuts text into the pieces within which BPE merges. The split patterns of GPT-2, Llama-3
// and Qwen-2 are hand-written state machines (linear, no backtracking); any other goes to PCRE2.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace oryx::tokenizer {

class Regex;

class Splitter {
 public:
  // GPT-2's pattern, which the ByteLevel pre-tokenizer applies when use_regex is set.
  static Splitter gpt2();
  // A pattern in the syntax of tokenizer.json. Throws Error when PCRE2 cannot compile it.
  static Splitter pattern(const std::string& regex);
  // The same, but always by PCRE2: judges the hand-written ones.
  static Splitter general(const std::string& regex);

  // Calls use(std::string_view piece) for the matches and for what lies between them, in order; the pieces
  // together are `text`. A byte that is not UTF-8 counts as a symbol: not a letter, number or space.
  template <typename Use>
  void for_each(std::string_view text, Use&& use) const {
    if (next_ == nullptr) {
      for_each_match(text, use);
      return;
    }
    const char* const end = text.data() + text.size();
    for (const char* at = text.data(); at < end;) {
      const char* const stop = next_(at, end);
      use(std::string_view(at, static_cast<size_t>(stop - at)));
      at = stop;
    }
  }

  // True when pieces depend only on the characters around their borders, as safe_cut() needs.
  bool is_hand_written() const { return next_ != nullptr; }

 private:
  using NextPiece = const char* (*)(const char* at, const char* end);

  void for_each_match(std::string_view text, const std::function<void(std::string_view)>& use) const;

  NextPiece next_ = nullptr;
  std::shared_ptr<const Regex> regex_;
};

}  // namespace oryx::tokenizer
