// For tests: files and random bytes that are hard to tokenize.
#pragma once

#include <rapidcheck.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer/unicode.h"

namespace oryx::tokenizer {

class TestFolder {
 public:
  TestFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "oryx-tokenizer-XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TestFolder() { std::filesystem::remove_all(path_); }
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;

  std::string file(const std::string& name) const { return (path_ / name).string(); }
  std::string write(const std::string& name, std::string_view content) const {
    std::ofstream(file(name), std::ios::binary) << content;
    return file(name);
  }

 private:
  std::filesystem::path path_;
};

// The printable character that stands for a byte in tokenizer.json.
inline std::string byte_symbol(uint8_t byte) {
  uint32_t next = 0x100;
  for (int other = 0; other < byte; ++other) {
    if (!((other >= '!' && other <= '~') || (other >= 0xA1 && other != 0xAD))) ++next;
  }
  const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
  std::string symbol;
  append_utf8(symbol, printable ? byte : next);
  return symbol;
}

// A byte-level tokenizer.json whose ids 0 to 255 are the bytes, with these merges of symbols, then
// <|endoftext|>.
inline nlohmann::json test_tokenizer(const std::vector<std::pair<std::string, std::string>>& merges = {}) {
  nlohmann::json vocabulary = nlohmann::json::object(), merge_list = nlohmann::json::array();
  for (int byte = 0; byte < 256; ++byte) vocabulary[byte_symbol(static_cast<uint8_t>(byte))] = byte;
  for (const auto& [left, right] : merges) {
    const int id = static_cast<int>(vocabulary.size());
    if (!vocabulary.contains(left + right)) vocabulary[left + right] = id;
    merge_list.push_back({left, right});
  }
  const nlohmann::json end = {{"id", vocabulary.size()}, {"content", "<|endoftext|>"}, {"special", true}};
  return {{"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", merge_list}}},
          {"added_tokens", nlohmann::json::array({end})},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
          {"decoder", {{"type", "ByteLevel"}}}};
}

// `count` merges of random tokens, so that ranks and lengths are in no particular order.
inline std::vector<std::pair<std::string, std::string>> random_merges(uint32_t seed, size_t count,
                                                                      std::string_view letters) {
  std::mt19937 random(seed);
  std::vector<std::string> tokens;
  for (const char letter : letters) tokens.push_back(byte_symbol(static_cast<uint8_t>(letter)));
  std::vector<std::pair<std::string, std::string>> merges;
  while (merges.size() < count) {
    const std::string left = tokens[random() % tokens.size()], right = tokens[random() % tokens.size()];
    if (left.size() + right.size() > 12) continue;
    merges.emplace_back(left, right);
    tokens.push_back(left + right);
  }
  return merges;
}

// Bytes with many letters, digits, spaces, line breaks, contractions, marks and broken UTF-8 next to each
// other.
inline rc::Gen<std::string> hard_text() {
  static const std::vector<std::string> parts = {"a",
                                                 "b",
                                                 "Z",
                                                 "'s",
                                                 "'S",
                                                 "'ll",
                                                 "'LL",
                                                 "'re",
                                                 "'Ve",
                                                 "'",
                                                 "'\u017f",
                                                 " ",
                                                 "  ",
                                                 "\n",
                                                 "\r",
                                                 "\r\n",
                                                 "\t",
                                                 "\v",
                                                 "\u0085",
                                                 "\u00a0",
                                                 "\u3000",
                                                 "\u2028",
                                                 "\u180e",
                                                 "0",
                                                 "7",
                                                 "\u00bd",
                                                 "\u2167",
                                                 "\u0663",
                                                 "!",
                                                 "-",
                                                 "<|endoftext|>",
                                                 "<|",
                                                 "e\u0301",
                                                 "\u0301",
                                                 "\u00e9",
                                                 "\u4e2d",
                                                 "\uac00",
                                                 "\U0001f600",
                                                 "\x80",
                                                 "\xc3",
                                                 "\xe4\xb8",
                                                 "\xf0\x9f",
                                                 "\xff",
                                                 "\xed\xa0\x80",
                                                 "\xc0\xaf",
                                                 std::string(1, '\0'),
                                                 "\u200b",
                                                 "x y"};
  return rc::gen::map(rc::gen::container<std::vector<size_t>>(rc::gen::inRange<size_t>(0, parts.size())),
                      [](const std::vector<size_t>& picks) {
                        std::string text;
                        for (const size_t pick : picks) text += parts[pick];
                        return text;
                      });
}

}  // namespace oryx::tokenizer
