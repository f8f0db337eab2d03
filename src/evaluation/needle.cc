#include "evaluation/needle.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "base/error.h"
#include "base/random.h"
#include "evaluation/harness_text.h"
#include "tokenizer/text_reader.h"
#include "tokenizer/unicode.h"

namespace oryx::evaluation {

namespace {

#include "evaluation/needle_words.inc"

using Haystack = NeedleKind::Haystack;
using Word = NeedleKind::Word;

constexpr std::string_view kNoise =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

// The draws of one sample, one after the other.
class Dice {
 public:
  Dice(uint64_t seed, uint64_t sample) : key_(random_u64(seed, 0x6E6565646C65, sample)) {}  // "needle"

  uint64_t bits() { return random_u64(key_, 0, count_++); }
  uint64_t below(uint64_t size) { return bits() % size; }

  std::string draw(Word word) {
    switch (word) {
      case Word::words:
        return fmt::format("{}-{}", kAdjectives[below(std::size(kAdjectives))],
                           kNouns[below(std::size(kNouns))]);
      case Word::numbers:
        return fmt::format("{}", 1'000'000 + below(9'000'000));
      case Word::uuids:
        return uuid();
    }
    return "";
  }

 private:
  // Version 4 of RFC 9562.
  std::string uuid() {
    const uint64_t high = (bits() & ~uint64_t{0xF000}) | 0x4000;
    const uint64_t low = (bits() >> 2) | uint64_t{1} << 63;
    return fmt::format("{:08x}-{:04x}-{:04x}-{:04x}-{:012x}", high >> 32, high >> 16 & 0xFFFF, high & 0xFFFF,
                       low >> 48, low & 0xFFFFFFFFFFFF);
  }

  uint64_t key_, count_ = 0;
};

std::string_view plural_of(Word word) {
  return word == Word::words ? "words" : word == Word::numbers ? "numbers" : "uuids";
}

struct Needle {
  std::string key, value;
  std::string sentence;
};

Needle draw_needle(const NeedleKind& kind, Dice& dice) {
  Needle needle{dice.draw(kind.key), dice.draw(kind.value), {}};
  needle.sentence = kind.haystack == Haystack::pairs
                        ? fmt::format("\"{}\": \"{}\"", needle.key, needle.value)
                        : fmt::format("One of the special magic {} for {} is: {}.", plural_of(kind.value),
                                      needle.key, needle.value);
  return needle;
}

// Words joined into sentences: one ends with a word whose last mark is . ! or ?, quotes and brackets aside.
std::vector<std::string> sentences_of(const std::vector<std::string>& essay, int64_t words) {
  std::vector<std::string> sentences;
  bool ended = true;
  for (int64_t i = 0; i < words; ++i) {
    const std::string& word = essay[static_cast<size_t>(i) % essay.size()];
    if (ended) sentences.emplace_back();
    if (!ended) sentences.back() += ' ';
    sentences.back() += word;
    const size_t last = word.find_last_not_of("\"')]");
    ended = last != std::string::npos && std::string_view(".!?").find(word[last]) != std::string_view::npos;
  }
  return sentences;
}

// Another needle than the one that will be asked for.
std::string draw_other(const NeedleKind& kind, const Needle& wanted, Dice& dice) {
  Needle needle = draw_needle(kind, dice);
  while (needle.key == wanted.key) needle = draw_needle(kind, dice);
  return needle.sentence;
}

std::vector<std::string> haystack_of(const NeedleKind& kind, int64_t units,
                                     const std::vector<std::string>& essay, const Needle& wanted,
                                     Dice& dice) {
  if (kind.haystack == Haystack::essay) return sentences_of(essay, units);
  std::vector<std::string> pieces;
  for (int64_t i = 0; i < units; ++i) {
    pieces.push_back(kind.haystack == Haystack::noise ? std::string(kNoise) : draw_other(kind, wanted, dice));
  }
  return pieces;
}

}  // namespace

NeedleKind needle_kind(const std::string& task) {
  if (task == "needle_single_1") return {Haystack::noise, Word::words, Word::numbers};
  if (task == "needle_single_2") return {Haystack::essay, Word::words, Word::numbers};
  if (task == "needle_single_3") return {Haystack::essay, Word::words, Word::uuids};
  if (task == "needle_multikey_1") return {Haystack::essay, Word::words, Word::numbers, 4};
  if (task == "needle_multikey_2") return {Haystack::needles, Word::words, Word::numbers};
  if (task == "needle_multikey_3") return {Haystack::needles, Word::uuids, Word::uuids};
  if (task == "kv_uuid") return {Haystack::pairs, Word::uuids, Word::uuids};
  fail_usage("unknown needle task '{}'", task);
}

NeedleText make_needle(const NeedleKind& kind, int64_t units, double depth,
                       const std::vector<std::string>& essay, uint64_t seed, uint64_t sample) {
  Dice dice(seed, sample);
  const Needle wanted = draw_needle(kind, dice);
  const std::vector<std::string> pieces = haystack_of(kind, units, essay, wanted, dice);
  const auto size = static_cast<int64_t>(pieces.size());

  // Which needles stand before which piece: the wanted one at its depth, others anywhere.
  std::vector<std::pair<int64_t, std::string>> needles;
  const int64_t place = std::llround(depth * static_cast<double>(size));
  needles.emplace_back(place, wanted.sentence);
  for (int64_t k = 1; k < kind.keys; ++k) {
    needles.emplace_back(dice.below(static_cast<uint64_t>(size) + 1), draw_other(kind, wanted, dice));
  }
  std::stable_sort(needles.begin(), needles.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });

  const bool pairs = kind.haystack == Haystack::pairs;
  const std::string_view joint = kind.haystack == Haystack::essay ? " " : pairs ? ",\n " : "\n";
  std::string haystack;
  const auto append = [&](const std::string& piece) {
    if (!haystack.empty()) haystack += joint;
    haystack += piece;
  };
  auto next = needles.begin();
  for (int64_t i = 0; i <= size; ++i) {
    for (; next != needles.end() && next->first == i; ++next) append(next->second);
    if (i < size) append(pieces[static_cast<size_t>(i)]);
  }

  NeedleText text;
  text.answer = wanted.value;
  if (size > 0) text.depth = static_cast<double>(place) / static_cast<double>(size);
  if (pairs) {
    text.context =
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        "JSON data:\n{" +
        haystack + "}";
    text.prompt = fmt::format("\n\nKey: \"{}\"\nCorresponding value:", wanted.key);
    return text;
  }
  std::string_view name = plural_of(kind.value);
  name.remove_suffix(1);
  text.context = fmt::format(
      "A special magic {} is hidden within the following text. Make sure to memorize it. "
      "I will quiz you about the {} afterwards.\n{}",
      name, name, haystack);
  text.prompt = fmt::format(
      "\nWhat is the special magic {} for {} mentioned in the provided text? The special "
      "magic {} for {} mentioned in the provided text is",
      name, wanted.key, name, wanted.key);
  return text;
}

std::vector<std::string> read_words(const std::string& path, size_t count) {
  tokenizer::TextReader reader(tokenizer::find_text_files({path}), size_t{1} << 16,
                               [](std::string_view text) { return text.rfind(' ') + 1; });
  std::vector<std::string> words;
  for (tokenizer::TextPiece piece; words.size() < count && reader.next(piece);) {
    std::string word;
    const std::string& text = piece.bytes;
    for (size_t at = 0; at <= text.size() && words.size() < count;) {
      const auto character = at < text.size()
                                 ? tokenizer::decode_character(text.data() + at, text.data() + text.size())
                                 : tokenizer::Character{' ', 1};
      if (is_blank(character.code)) {
        if (!word.empty()) words.push_back(std::exchange(word, ""));
      } else {
        word.append(text, at, character.size);
      }
      at += character.size;
    }
  }
  expect(!words.empty(), "{} holds no words", path);
  return words;
}

}  // namespace oryx::evaluation
