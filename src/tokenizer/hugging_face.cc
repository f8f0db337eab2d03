#include "tokenizer/hugging_face.h"

#include <array>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "tokenizer/bpe_tokenizer.h"
#include "tokenizer/sha256.h"
#include "tokenizer/unicode.h"

namespace oryx::tokenizer {

namespace {

using nlohmann::json;

// Larger ids are no vocabulary but a broken file.
constexpr int64_t kMaxId = (1 << 24) - 1;

const json* member(const json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

bool flag(const json& object, const char* key, bool otherwise) {
  const json* value = member(object, key);
  return value == nullptr ? otherwise : value->get<bool>();
}

std::string type_of(const json& object) { return object.at("type").get<std::string>(); }

int32_t id_of(const json& value, const std::string& token) {
  expect(value.is_number_integer() && value.get<int64_t>() >= 0 && value.get<int64_t>() <= kMaxId,
         "token '{}' has the id {}: expected an integer from 0 to {}", token, value.dump(), kMaxId);
  return value.get<int32_t>();
}

// Byte-level files write each byte as a printable character: itself where it is one (in Latin-1), else the
// next of U+0100, U+0101, …
class ByteSymbols {
 public:
  ByteSymbols() {
    bytes_.fill(-1);
    uint32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
      bytes_[printable ? static_cast<uint32_t>(byte) : next++] = static_cast<int16_t>(byte);
    }
  }

  // Nothing when `symbols` has a character that stands for no byte.
  std::optional<std::string> to_bytes(const std::string& symbols) const {
    std::string bytes;
    const char* const end = symbols.data() + symbols.size();
    for (const char* at = symbols.data(); at < end;) {
      const Character character = decode_character(at, end);
      if (character.code >= bytes_.size() || bytes_[character.code] < 0) return std::nullopt;
      bytes += static_cast<char>(bytes_[character.code]);
      at += character.size;
    }
    return bytes;
  }

 private:
  std::array<int16_t, 0x100 + 68> bytes_;  // 68 bytes are not printable
};

void read_model(const json& model, TokenizerDefinition& definition) {
  if (const json* type = member(model, "type")) {
    expect(*type == "BPE", "model type {} is not supported: expected BPE", type->dump());
  }
  if (const json* dropout = member(model, "dropout")) {
    expect(*dropout == 0, "model.dropout {} is not supported: expected null", dropout->dump());
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const json* value = member(model, key);
    expect(value == nullptr || *value == "", "model.{} is not supported: expected none", key);
  }
  definition.model.ignore_merges = flag(model, "ignore_merges", false);

  const ByteSymbols symbols;
  for (const auto& [token, value] : model.at("vocab").items()) {
    const int32_t id = id_of(value, token);
    if (auto bytes = symbols.to_bytes(token)) {
      definition.model.vocabulary.emplace_back(std::move(*bytes), id);
    } else {
      definition.other_tokens.emplace_back(token, id);
    }
  }
  for (const json& merge : model.at("merges")) {
    std::string left, right;
    if (merge.is_string()) {
      const std::string& text = merge.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      expect(space != std::string::npos && text.find(' ', space + 1) == std::string::npos,
             "merge {} is malformed: expected two symbols with one space between", merge.dump());
      left = text.substr(0, space), right = text.substr(space + 1);
    } else {
      expect(merge.is_array() && merge.size() == 2, "merge {} is malformed: expected two strings",
             merge.dump());
      left = merge[0].get<std::string>(), right = merge[1].get<std::string>();
    }
    auto left_bytes = symbols.to_bytes(left), right_bytes = symbols.to_bytes(right);
    expect(left_bytes && right_bytes, "merge {} is not of byte-level symbols", merge.dump());
    definition.model.merges.emplace_back(std::move(*left_bytes), std::move(*right_bytes));
  }
}

void read_normalizer(const json& normalizer, TokenizerDefinition& definition) {
  const std::string type = type_of(normalizer);
  if (type == "NFC") {
    definition.nfc = true;
  } else if (type == "Sequence") {
    for (const json& part : normalizer.at("normalizers")) read_normalizer(part, definition);
  } else {
    fail("normalizer type '{}' is not supported: expected NFC, or a Sequence of it", type);
  }
}

Splitter read_split(const json& split) {
  const std::string behavior = split.at("behavior").get<std::string>();
  expect(behavior == "Isolated", "Split behavior '{}' is not supported: expected Isolated", behavior);
  const json& pattern = split.at("pattern");
  if (const json* regex = member(pattern, "Regex")) return Splitter::pattern(regex->get<std::string>());
  // In \Q…\E everything stands for itself, except \E.
  std::string literal = pattern.at("String").get<std::string>();
  for (size_t at = 0; (at = literal.find("\\E", at)) != std::string::npos; at += 7) {
    literal.replace(at, 2, "\\E\\\\E\\Q");
  }
  return Splitter::general("\\Q" + literal + "\\E");
}

// `pre_tokenizers`: those in effect, in order.
void read_pre_tokenizers(const std::vector<const json*>& pre_tokenizers, TokenizerDefinition& definition) {
  for (size_t i = 0; i < pre_tokenizers.size(); ++i) {
    const json& part = *pre_tokenizers[i];
    const std::string type = type_of(part);
    const bool last = i + 1 == pre_tokenizers.size();
    if (type == "Split" && !last) {
      definition.splitters.push_back(read_split(part));
    } else if (type == "ByteLevel" && last) {
      definition.add_prefix_space = flag(part, "add_prefix_space", true);
      definition.prefix_stage = definition.splitters.size();
      if (flag(part, "use_regex", true)) definition.splitters.push_back(Splitter::gpt2());
      return;
    } else {
      fail("pre-tokenizer type '{}' is not supported here: expected ByteLevel, after any number of Split",
           type);
    }
  }
  fail("there is no pre-tokenizer: expected ByteLevel, after any number of Split");
}

void flatten(const json& pre_tokenizer, std::vector<const json*>& parts) {
  if (type_of(pre_tokenizer) == "Sequence") {
    for (const json& part : pre_tokenizer.at("pretokenizers")) flatten(part, parts);
  } else {
    parts.push_back(&pre_tokenizer);
  }
}

void read_added_tokens(const json& tokens, TokenizerDefinition& definition) {
  for (const json& entry : tokens) {
    AddedToken token;
    token.content = entry.at("content").get<std::string>();
    token.id = id_of(entry.at("id"), token.content);
    expect(!flag(entry, "single_word", false), "added token '{}' has single_word, which is not supported",
           token.content);
    token.special = flag(entry, "special", false);
    token.normalized = flag(entry, "normalized", !token.special);
    token.strip_left = flag(entry, "lstrip", false);
    token.strip_right = flag(entry, "rstrip", false);
    definition.added_tokens.push_back(std::move(token));
  }
}

TokenizerDefinition read_definition(const json& file) {
  TokenizerDefinition definition;
  expect(file.is_object() && file.contains("model"),
         "no tokenizer.json: expected an object with a \"model\"");
  read_model(file.at("model"), definition);
  if (const json* tokens = member(file, "added_tokens")) read_added_tokens(*tokens, definition);
  if (const json* normalizer = member(file, "normalizer")) read_normalizer(*normalizer, definition);
  std::vector<const json*> pre_tokenizers;
  if (const json* pre_tokenizer = member(file, "pre_tokenizer")) flatten(*pre_tokenizer, pre_tokenizers);
  read_pre_tokenizers(pre_tokenizers, definition);
  if (const json* decoder = member(file, "decoder")) {
    expect(type_of(*decoder) == "ByteLevel", "decoder type '{}' is not supported: expected ByteLevel",
           type_of(*decoder));
  }
  return definition;
}

}  // namespace

std::unique_ptr<const Tokenizer> load_hugging_face(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  expect(stream.good(), "cannot open the tokenizer {}: expected a tokenizer.json or the word bytes", path);
  const std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  try {
    TokenizerDefinition definition = read_definition(json::parse(bytes));
    definition.identity = sha256_hex(bytes);
    return std::make_unique<BpeTokenizer>(std::move(definition));
  } catch (const json::exception& error) {
    fail("{}: malformed tokenizer.json: {}", path, error.what());
  } catch (const Error& error) {
    fail("{}: {}", path, error.what());
  }
}

}  // namespace oryx::tokenizer
