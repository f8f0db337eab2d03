#include "tokenizer/unicode.h"

#include <algorithm>
#include <cstdlib>
#include <unordered_map>
#include <vector>

namespace oryx::tokenizer {

namespace {

struct Range {
  uint32_t first, last;
};
struct CombiningRange {
  uint32_t first, last, combining_class;
};
// One step of a canonical decomposition; `second` is 0 when there is one character.
struct Decomposition {
  uint32_t code, first, second = 0;
};

#include "tokenizer/unicode_tables.inc"

constexpr uint32_t kSpaces[] = {0x09,   0x0a,   0x0b,   0x0c,   0x0d,   0x20,   0x85,   0xa0,   0x1680,
                                0x2000, 0x2001, 0x2002, 0x2003, 0x2004, 0x2005, 0x2006, 0x2007, 0x2008,
                                0x2009, 0x200a, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000};

// Hangul syllables are composed by arithmetic: The Unicode Standard, section 3.12.
constexpr uint32_t kHangulS = 0xAC00, kHangulL = 0x1100, kHangulV = 0x1161, kHangulT = 0x11A7;
constexpr uint32_t kHangulLCount = 19, kHangulVCount = 21, kHangulTCount = 28;
constexpr uint32_t kHangulSCount = kHangulLCount * kHangulVCount * kHangulTCount;

// Bits of a character's byte in the table: its CharacterClass, and what normalising has to look at.
constexpr uint8_t kClassMask = 3;
constexpr uint8_t kDecomposes = 4;       // has a canonical decomposition
constexpr uint8_t kCombines = 8;         // combining class other than 0
constexpr uint8_t kMayNotBeNormal = 16;  // NFC_Quick_Check is not Yes

struct Tables {
  std::vector<uint8_t> bits = std::vector<uint8_t>(kInvalidByte + 1);
  std::unordered_map<uint32_t, Decomposition> decompositions;
  std::unordered_map<uint64_t, uint32_t> compositions;  // first << 32 | second

  Tables() {
    const auto set_class = [this](uint32_t first, uint32_t last, CharacterClass value) {
      for (uint32_t code = first; code <= last; ++code) bits[code] |= static_cast<uint8_t>(value);
    };
    for (const Range& range : kLetters) set_class(range.first, range.last, CharacterClass::kLetter);
    for (const Range& range : kNumbers) set_class(range.first, range.last, CharacterClass::kNumber);
    for (const uint32_t code : kSpaces) set_class(code, code, CharacterClass::kSpace);
    for (const CombiningRange& range : kCombiningClasses) {
      for (uint32_t code = range.first; code <= range.last; ++code) bits[code] |= kCombines | kMayNotBeNormal;
    }
    for (const Decomposition& entry : kCompositions) {
      decompositions[entry.code] = entry;
      compositions[uint64_t{entry.first} << 32 | entry.second] = entry.code;
      bits[entry.code] |= kDecomposes;
      bits[entry.second] |= kMayNotBeNormal;
    }
    for (const Decomposition& entry : kOnlyDecompositions) {
      decompositions[entry.code] = entry;
      bits[entry.code] |= kDecomposes | kMayNotBeNormal;
    }
    for (uint32_t i = 0; i < kHangulSCount; ++i) bits[kHangulS + i] |= kDecomposes;
    for (uint32_t i = 0; i < kHangulVCount; ++i) bits[kHangulV + i] |= kMayNotBeNormal;
    for (uint32_t i = 1; i < kHangulTCount; ++i) bits[kHangulT + i] |= kMayNotBeNormal;
  }
};

const Tables& tables() {
  static const Tables instance;
  return instance;
}

uint8_t combining_class(uint32_t code) {
  const auto* range =
      std::upper_bound(std::begin(kCombiningClasses), std::end(kCombiningClasses), code,
                       [](uint32_t value, const CombiningRange& r) { return value < r.first; });
  return range != std::begin(kCombiningClasses) && code <= (range - 1)->last ? (range - 1)->combining_class
                                                                             : 0;
}

// A code point with its combining class; kInvalidByte + byte stands for a byte that is not UTF-8.
struct Unit {
  uint32_t code;
  uint8_t combining_class;
};

void decompose(const Tables& data, uint32_t code, std::vector<Unit>& out) {
  const uint8_t bits = code < kInvalidByte ? data.bits[code] : 0;
  if (!(bits & kDecomposes)) {
    out.push_back({code, bits & kCombines ? combining_class(code) : uint8_t{0}});
  } else if (code >= kHangulS && code < kHangulS + kHangulSCount) {
    const uint32_t index = code - kHangulS;
    out.push_back({kHangulL + index / (kHangulVCount * kHangulTCount), 0});
    out.push_back({kHangulV + index / kHangulTCount % kHangulVCount, 0});
    if (index % kHangulTCount != 0) out.push_back({kHangulT + index % kHangulTCount, 0});
  } else {
    const Decomposition& entry = data.decompositions.at(code);
    decompose(data, entry.first, out);
    if (entry.second != 0) decompose(data, entry.second, out);
  }
}

// 0 when the pair does not compose.
uint32_t compose(const Tables& data, uint32_t first, uint32_t second) {
  if (second >= kInvalidByte || !(data.bits[second] & kMayNotBeNormal)) return 0;
  if (first - kHangulL < kHangulLCount && second - kHangulV < kHangulVCount) {
    return kHangulS + ((first - kHangulL) * kHangulVCount + (second - kHangulV)) * kHangulTCount;
  }
  if (first - kHangulS < kHangulSCount && (first - kHangulS) % kHangulTCount == 0 &&
      second - kHangulT - 1 < kHangulTCount - 1) {
    return first + (second - kHangulT);
  }
  const auto found = data.compositions.find(uint64_t{first} << 32 | second);
  return found == data.compositions.end() ? 0 : found->second;
}

// The Unicode Standard, D108: within a run of marks, by combining class, stable.
void order_marks(std::vector<Unit>& units) {
  for (size_t i = 0; i < units.size();) {
    if (units[i].combining_class == 0) {
      ++i;
      continue;
    }
    size_t end = i + 1;
    while (end < units.size() && units[end].combining_class != 0) ++end;
    std::stable_sort(units.begin() + i, units.begin() + end,
                     [](const Unit& a, const Unit& b) { return a.combining_class < b.combining_class; });
    i = end;
  }
}

// The Unicode Standard, D117, in place.
void compose_all(const Tables& data, std::vector<Unit>& units) {
  size_t size = 0;
  Unit* starter = nullptr;
  uint8_t last_class = 0;
  for (const Unit unit : units) {
    if (starter != nullptr && (last_class == 0 || last_class < unit.combining_class)) {
      if (const uint32_t composed = compose(data, starter->code, unit.code)) {
        starter->code = composed;
        continue;
      }
    }
    units[size] = unit;
    if (unit.combining_class == 0) starter = &units[size];
    last_class = unit.combining_class;
    ++size;
  }
  units.resize(size);
}

bool is_normal(const Tables& data, std::string_view text) {
  const char* const end = text.data() + text.size();
  for (const char* at = text.data(); at < end;) {
    if (static_cast<uint8_t>(*at) < 0xCC) {  // below U+0300 everything is normal, and so is an invalid byte
      ++at;
      continue;
    }
    const Character character = decode_character(at, end);
    if (data.bits[character.code] & kMayNotBeNormal) return false;
    at += character.size;
  }
  return true;
}

}  // namespace

void append_utf8(std::string& text, uint32_t code) {
  const auto tail = [code](int shift) { return static_cast<char>(0x80 | (code >> shift & 0x3F)); };
  if (code < 0x80) {
    text += static_cast<char>(code);
  } else if (code < 0x800) {
    text += {static_cast<char>(0xC0 | code >> 6), tail(0)};
  } else if (code < 0x10000) {
    text += {static_cast<char>(0xE0 | code >> 12), tail(6), tail(0)};
  } else {
    text += {static_cast<char>(0xF0 | code >> 18), tail(12), tail(6), tail(0)};
  }
}

CharacterClass character_class(uint32_t code) {
  return static_cast<CharacterClass>(tables().bits[code] & kClassMask);
}

size_t complete_prefix(std::string_view text) {
  const size_t furthest = std::min<size_t>(text.size(), 3);
  for (size_t back = 1; back <= furthest; ++back) {
    const uint8_t lead = static_cast<uint8_t>(text[text.size() - back]);
    if ((lead & 0xC0) == 0x80) continue;
    const size_t length = lead < 0xC2 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 1;
    if (length <= back) break;
    // The second byte of some leads is restricted (overlong forms, surrogates, past U+10FFFF).
    if (back >= 2) {
      const uint8_t second = static_cast<uint8_t>(text[text.size() - back + 1]);
      if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second >= 0xA0) ||
          (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second >= 0x90)) {
        break;
      }
    }
    return text.size() - back;
  }
  return text.size();
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  const char* const end = text.data() + text.size();
  for (const char* at = text.data(); at < end;) {
    const Character character = decode_character(at, end);
    if (character.code == kInvalidByte) {
      out += "\xEF\xBF\xBD";
    } else {
      out.append(at, character.size);
    }
    at += character.size;
  }
  return out;
}

std::string_view normalize_nfc(std::string_view text, std::string& storage) {
  const Tables& data = tables();
  if (is_normal(data, text)) return text;
  std::vector<Unit> units;
  units.reserve(text.size());
  const char* const end = text.data() + text.size();
  for (const char* at = text.data(); at < end;) {
    const Character character = decode_character(at, end);
    const uint32_t raw = character.code == kInvalidByte ? static_cast<uint8_t>(*at) : 0;
    decompose(data, character.code + raw, units);
    at += character.size;
  }
  order_marks(units);
  compose_all(data, units);
  storage.clear();
  storage.reserve(text.size());
  for (const Unit& unit : units) {
    if (unit.code >= kInvalidByte) {
      storage += static_cast<char>(unit.code - kInvalidByte);
    } else {
      append_utf8(storage, unit.code);
    }
  }
  return storage;
}

}  // namespace oryx::tokenizer
