#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer/regex.h"

#include <pcre2.h>

#include <vector>

#include "base/error.h"
#include "tokenizer/unicode.h"

namespace oryx::tokenizer {

namespace {

std::string message_of(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

std::string with_white_space(const std::string& pattern) {
  std::string out;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '\\' || i + 1 == pattern.size()) {
      out += pattern[i];
      continue;
    }
    const char escaped = pattern[++i];
    if (escaped == 's') {
      out += "\\p{White_Space}";
    } else if (escaped == 'S') {
      out += "\\P{White_Space}";
    } else {
      out += {'\\', escaped};
    }
  }
  return out;
}

// What matching writes to; one per thread, since the compiled pattern is shared.
struct Workspace {
  pcre2_match_data_8* data = pcre2_match_data_create_8(1, nullptr);
  pcre2_match_context_8* context = pcre2_match_context_create_8(nullptr);
  pcre2_jit_stack_8* stack = pcre2_jit_stack_create_8(32 << 10, 64 << 20, nullptr);

  Workspace() { pcre2_jit_stack_assign_8(context, nullptr, stack); }
  ~Workspace() {
    pcre2_jit_stack_free_8(stack);
    pcre2_match_context_free_8(context);
    pcre2_match_data_free_8(data);
  }
};

}  // namespace

Regex::Regex(const std::string& pattern) : pattern_(pattern) {
  const std::string translated = with_white_space(pattern);
  int error = 0;
  PCRE2_SIZE offset = 0;
  code_ = pcre2_compile_8(reinterpret_cast<PCRE2_SPTR8>(translated.data()), translated.size(),
                          PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
  expect(code_ != nullptr, "split pattern '{}': {}", pattern, message_of(error));
  pcre2_jit_compile_8(code_, PCRE2_JIT_COMPLETE);  // where there is no JIT, matching interprets
}

Regex::~Regex() { pcre2_code_free_8(code_); }

void Regex::for_each_valid(std::string_view text, const std::function<void(size_t, size_t)>& use) const {
  thread_local Workspace workspace;
  size_t at = 0;
  while (at < text.size()) {
    const int found = pcre2_match_8(code_, reinterpret_cast<PCRE2_SPTR8>(text.data()), text.size(), at,
                                    PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, workspace.data, workspace.context);
    if (found == PCRE2_ERROR_NOMATCH) return;
    expect(found >= 0, "split pattern '{}' at byte {} of a text: {}", pattern_, at, message_of(found));
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer_8(workspace.data);
    const size_t begin = bounds[0], end = bounds[1];
    use(begin, end);
    at = end;
  }
}

void Regex::for_each_match(std::string_view text, const std::function<void(size_t, size_t)>& use) const {
  std::string valid;
  std::vector<size_t> replaced;  // positions in `valid` of each U+FFFD that stands for one byte
  const char* const end = text.data() + text.size();
  const char* copied = text.data();
  for (const char* at = text.data(); at < end;) {
    const Character character = decode_character(at, end);
    if (character.code == kInvalidByte) {
      valid.append(copied, at);
      replaced.push_back(valid.size());
      valid += "\xEF\xBF\xBD";
      copied = at + 1;
    }
    at += character.size;
  }
  if (replaced.empty()) {
    for_each_valid(text, use);
    return;
  }
  valid.append(copied, end);
  size_t before = 0;  // replacements before the position last asked for; positions only grow
  const auto original = [&](size_t position) {
    while (before < replaced.size() && replaced[before] < position) ++before;
    return position - 2 * before;
  };
  for_each_valid(valid, [&](size_t begin, size_t stop) {
    const size_t from = original(begin);
    use(from, original(stop));
  });
}

}  // namespace oryx::tokenizer
