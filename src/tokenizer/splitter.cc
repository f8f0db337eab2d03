#include "tokenizer/splitter.h"

#include <array>

#include "tokenizer/regex.h"
#include "tokenizer/unicode.h"

namespace oryx::tokenizer {

namespace {

using enum CharacterClass;

constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

constexpr std::array<CharacterClass, 128> kAsciiClasses = [] {
  std::array<CharacterClass, 128> classes{};
  for (int c = 0; c < 128; ++c) {
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    const bool number = c >= '0' && c <= '9';
    const bool space = c == ' ' || (c >= '\t' && c <= '\r');
    classes[c] = letter ? kLetter : number ? kNumber : space ? kSpace : kOther;
  }
  return classes;
}();

struct Step {
  CharacterClass kind;
  uint32_t size;
};

inline Step step_at(const char* at, const char* end) {
  const uint8_t byte = static_cast<uint8_t>(*at);
  if (byte < 128) return {kAsciiClasses[byte], 1};
  const Character character = decode_character(at, end);
  return {character_class(character.code), character.size};
}

// The end of the run of `kind` that starts at `at`.
inline const char* run_end(CharacterClass kind, const char* at, const char* end) {
  while (at < end) {
    const Step step = step_at(at, end);
    if (step.kind != kind) break;
    at += step.size;
  }
  return at;
}

inline bool is_newline(char c) { return c == '\n' || c == '\r'; }

// Bytes of 's 't 're 've 'm 'll 'd at `at`, which points to the apostrophe; 0 when none is there.
template <bool any_case>
inline int contraction(const char* at, const char* end) {
  const auto letter = [&](int i) -> char {
    if (i >= end - at) return 0;
    return any_case && at[i] >= 'A' && at[i] <= 'Z' ? static_cast<char>(at[i] | 0x20) : at[i];
  };
  const char first = letter(1);
  switch (first) {
    case 's':
    case 't':
    case 'm':
    case 'd':
      return 2;
    case 'r':
    case 'v':
      return letter(2) == 'e' ? 3 : 0;
    case 'l':
      return letter(2) == 'l' ? 3 : 0;
    default:
      // U+017F, the long s, is an s to a pattern that ignores case.
      return any_case && first == '\xC5' && letter(2) == '\xBF' ? 3 : 0;
  }
}

// \s+(?!\S)|\s+ where [at, stop) is the whole run of spaces: all of it at the end of the text, else all but
// its last character, which the next piece may take, unless it is the only one.
inline const char* space_piece(const char* at, const char* stop, const char* end) {
  if (stop == end) return stop;
  const char* last = stop - 1;
  while (last > at && (static_cast<uint8_t>(*last) & 0xC0) == 0x80) --last;
  return last > at ? last : stop;
}

const char* next_gpt2(const char* at, const char* end) {
  if (*at == '\'') {
    if (const int size = contraction<false>(at, end)) return at + size;
  }
  const Step first = step_at(at, end);
  if (first.kind != kSpace) return run_end(first.kind, at + first.size, end);
  if (*at == ' ' && at + 1 < end) {
    const Step second = step_at(at + 1, end);
    if (second.kind != kSpace) return run_end(second.kind, at + 1 + second.size, end);
  }
  return space_piece(at, run_end(kSpace, at + first.size, end), end);
}

// Llama-3 takes up to three digits into a piece, Qwen-2 one; else they are the same.
template <int max_digits>
const char* next_llama3(const char* at, const char* end) {
  if (*at == '\'') {
    if (const int size = contraction<true>(at, end)) return at + size;
  }
  const Step first = step_at(at, end);
  const char* const second_at = at + first.size;
  if (first.kind == kLetter) return run_end(kLetter, second_at, end);
  if (first.kind == kNumber) {
    const char* stop = second_at;
    for (int digits = 1; digits < max_digits && stop < end; ++digits) {
      const Step step = step_at(stop, end);
      if (step.kind != kNumber) break;
      stop += step.size;
    }
    return stop;
  }
  const Step second = second_at < end ? step_at(second_at, end) : Step{kSpace, 0};
  if (second.kind == kLetter && !is_newline(*at)) return run_end(kLetter, second_at + second.size, end);
  const auto symbols = [end](const char* from) {
    const char* stop = run_end(kOther, from, end);
    while (stop < end && is_newline(*stop)) ++stop;
    return stop;
  };
  if (first.kind == kOther) return symbols(second_at);
  if (*at == ' ' && second.kind == kOther) return symbols(second_at + second.size);
  const char* const stop = run_end(kSpace, second_at, end);
  for (const char* newline = stop; newline > at; --newline) {
    if (is_newline(newline[-1])) return newline;  // \s*[\r\n]+ ends after the last line break of the run
  }
  return space_piece(at, stop, end);
}

}  // namespace

Splitter Splitter::gpt2() {
  Splitter splitter;
  splitter.next_ = next_gpt2;
  return splitter;
}

Splitter Splitter::pattern(const std::string& regex) {
  Splitter splitter;
  if (regex == kGpt2Pattern) {
    splitter.next_ = next_gpt2;
  } else if (regex == kLlama3Pattern) {
    splitter.next_ = next_llama3<3>;
  } else if (regex == kQwen2Pattern) {
    splitter.next_ = next_llama3<1>;
  } else {
    return general(regex);
  }
  return splitter;
}

Splitter Splitter::general(const std::string& regex) {
  Splitter splitter;
  splitter.regex_ = std::make_shared<const Regex>(regex);
  return splitter;
}

void Splitter::for_each_match(std::string_view text, const std::function<void(std::string_view)>& use) const {
  size_t done = 0;
  const auto piece = [&](size_t end) {
    if (end > done) use(text.substr(done, end - done));
    done = end;
  };
  regex_->for_each_match(text, [&](size_t begin, size_t end) {
    piece(begin);
    piece(end);
  });
  piece(text.size());
}

}  // namespace oryx::tokenizer
