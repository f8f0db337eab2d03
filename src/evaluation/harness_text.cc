#include "evaluation/harness_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "tokenizer/regex.h"
#include "tokenizer/unicode.h"

namespace oryx::evaluation {

namespace {

using tokenizer::Character;

std::vector<int64_t> encode(const tokenizer::Tokenizer& tokenizer, std::string_view text) {
  const std::vector<int32_t> ids = tokenizer.encode(text, /*allow_special=*/false);
  return {ids.begin(), ids.end()};
}

std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  size_t at = 0;
  for (size_t found; (found = text.find(from, at)) != std::string_view::npos; at = found + from.size()) {
    result.append(text.substr(at, found - at)).append(to);
  }
  return result.append(text.substr(at));
}

// re.sub(r"open\s*([^close]*?)\s*close", "open\1close"): no blanks inside brackets or quotes.
std::string tightened(std::string_view text, char open, char close) {
  std::string result;
  size_t at = 0;
  while (true) {
    const size_t begin = text.find(open, at);
    const size_t end = begin == std::string_view::npos ? begin : text.find(close, begin + 1);
    if (end == std::string_view::npos) break;
    result += text.substr(at, begin + 1 - at);
    result += strip_blanks(text.substr(begin + 1, end - begin - 1));
    result += close;
    at = end + 1;
  }
  return result.append(text.substr(at));
}

// re.sub(r"/' [0-9]/", r"/'[0-9]/"), whose replacement the harness takes literally.
std::string quoted_digits(std::string text) {
  constexpr std::string_view kBefore = "/' ";
  for (size_t at = 0; (at = text.find(kBefore, at)) != std::string::npos; ++at) {
    if (at + 4 < text.size() && text[at + 3] >= '0' && text[at + 3] <= '9' && text[at + 4] == '/') {
      text.replace(at, 5, "/'[0-9]/");
    }
  }
  return text;
}

bool is_title(std::string_view line) {
  const std::string joined = replaced(replaced(line, "= = =", "==="), "= =", "==");
  const std::string_view text = strip_blanks(joined);
  return text.starts_with("= ") && text.ends_with(" =");
}

}  // namespace

EncodedPair encode_pair(const tokenizer::Tokenizer& tokenizer, std::string_view context,
                        std::string_view continuation) {
  const std::string whole = std::string(context) + std::string(continuation);
  EncodedPair pair;
  pair.context = encode(tokenizer, strip_trailing_blanks(context));
  std::vector<int64_t> ids = encode(tokenizer, whole);
  const size_t cut = std::min(pair.context.size(), ids.size());
  pair.continuation.assign(ids.begin() + static_cast<std::ptrdiff_t>(cut), ids.end());
  if (pair.context.empty()) pair.context.push_back(tokenizer.end_of_text());
  return pair;
}

bool is_blank(uint32_t code) {
  return (code >= 0x1C && code <= 0x1F) ||
         tokenizer::character_class(code) == tokenizer::CharacterClass::kSpace;
}

std::string_view strip_trailing_blanks(std::string_view text) {
  size_t kept = 0;
  for (size_t at = 0; at < text.size();) {
    const Character character = tokenizer::decode_character(text.data() + at, text.data() + text.size());
    at += character.size;
    if (!is_blank(character.code)) kept = at;
  }
  return text.substr(0, kept);
}

std::string_view strip_blanks(std::string_view text) {
  while (!text.empty()) {
    const Character character = tokenizer::decode_character(text.data(), text.data() + text.size());
    if (!is_blank(character.code)) break;
    text.remove_prefix(character.size);
  }
  return strip_trailing_blanks(text);
}

int64_t count_words(std::string_view text) {
  int64_t words = 1;
  bool blank = false;
  for (size_t at = 0; at < text.size();) {
    const Character character = tokenizer::decode_character(text.data() + at, text.data() + text.size());
    at += character.size;
    if (is_blank(character.code) && !blank) ++words;
    blank = is_blank(character.code);
  }
  return words;
}

int64_t count_characters(std::string_view text) {
  int64_t count = 0;
  for (size_t at = 0; at < text.size(); ++count) {
    at += tokenizer::decode_character(text.data() + at, text.data() + text.size()).size;
  }
  return count;
}

std::vector<std::string> wikitext_pages(std::string_view text) {
  const std::string unix_text = replaced(replaced(text, "\r\n", "\n"), "\r", "\n");
  std::vector<std::string> pages;
  std::string page;
  bool empty = true;  // no line yet
  const auto finish = [&] {
    if (!strip_blanks(page).empty()) pages.push_back(std::move(page));
    page.clear();
    empty = true;
  };
  std::string_view rest = unix_text;
  while (true) {
    const size_t end = rest.find('\n');
    const std::string_view line = rest.substr(0, end);
    if (is_title(line)) finish();
    if (!empty) page += '\n';
    page += line;
    empty = false;
    if (end == std::string_view::npos) break;
    rest.remove_prefix(end + 1);
  }
  finish();
  return pages;
}

std::string wikitext_detokenize(std::string_view page) {
  std::string text = quoted_digits(replaced(page, "s '", "s'"));
  for (const auto& [from, to] : {std::pair{" @-@ ", "-"},
                                 {" @,@ ", ","},
                                 {" @.@ ", "."},
                                 {" : ", ": "},
                                 {" ; ", "; "},
                                 {" . ", ". "},
                                 {" ! ", "! "},
                                 {" ? ", "? "},
                                 {" , ", ", "}}) {
    text = replaced(text, from, to);
  }
  for (const auto& [open, close] : {std::pair{'(', ')'}, {'[', ']'}, {'{', '}'}, {'"', '"'}, {'\'', '\''}}) {
    text = tightened(text, open, close);
  }
  for (const auto& [from, to] : {std::pair{"= = = =", "===="},
                                 {"= = =", "==="},
                                 {"= =", "=="},
                                 {" \u00B0 ", "\u00B0"},
                                 {" \n", "\n"},
                                 {"\n ", "\n"},
                                 {" N ", " 1 "},
                                 {" 's", "'s"}}) {
    text = replaced(text, from, to);
  }
  return text;
}

std::vector<Window> rolling_windows(int64_t tokens, int64_t length) {
  std::vector<Window> windows;
  for (int64_t done = 0; done < tokens;) {
    const int64_t end = std::min(tokens, done + length);
    windows.push_back({std::max<int64_t>(-1, end - length - 1), end, done});
    done = end;
  }
  return windows;
}

bool contains_answer(std::string_view text, const std::vector<std::string>& answers) {
  return std::any_of(answers.begin(), answers.end(), [&](const std::string& answer) {
    std::string pattern = "(?i)";
    for (const char c : answer) {
      const bool plain = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c < 0;
      pattern += plain ? std::string(1, c) : fmt::format("\\x{{{:02x}}}", static_cast<int>(c));
    }
    bool found = false;
    tokenizer::Regex(pattern).for_each_match(text, [&](size_t, size_t) { found = true; });
    return found;
  });
}

}  // namespace oryx::evaluation
