#include "tokenizer/byte_tokenizer.h"

#include <array>

#include "base/error.h"

namespace oryx::tokenizer {

namespace {

constexpr std::string_view kEndOfTextName = "<|endoftext|>";

constexpr std::array<char, 256> kBytes = [] {
  std::array<char, 256> bytes{};
  for (int i = 0; i < 256; ++i) bytes[i] = static_cast<char>(i);
  return bytes;
}();

}  // namespace

void ByteTokenizer::encode_to(std::string_view text, bool allow_special, std::vector<int32_t>& ids) const {
  while (!text.empty()) {
    const size_t marker = allow_special ? text.find(kEndOfTextName) : std::string_view::npos;
    const std::string_view plain = text.substr(0, marker);
    const size_t size = ids.size();
    ids.resize(size + plain.size());
    for (size_t i = 0; i < plain.size(); ++i) ids[size + i] = static_cast<uint8_t>(plain[i]);
    if (marker == std::string_view::npos) return;
    ids.push_back(kEndOfText);
    text.remove_prefix(marker + kEndOfTextName.size());
  }
}

std::string_view ByteTokenizer::token_bytes(int32_t id) const {
  expect(id >= 0 && id <= kEndOfText, "token id {} is not in the vocabulary of the tokenizer 'bytes', 257",
         id);
  return id == kEndOfText ? kEndOfTextName : std::string_view(&kBytes[id], 1);
}

std::optional<int32_t> ByteTokenizer::find(std::string_view bytes) const {
  if (bytes == kEndOfTextName) return kEndOfText;
  if (bytes.size() == 1) return static_cast<uint8_t>(bytes[0]);
  return std::nullopt;
}

// Anywhere but inside what may become the text of the end-of-text token.
size_t ByteTokenizer::safe_cut(std::string_view text) const {
  const size_t tail = text.size() - std::min(text.size(), kEndOfTextName.size() - 1);
  for (size_t cut = tail; cut < text.size(); ++cut) {
    if (kEndOfTextName.starts_with(text.substr(cut))) return cut;
  }
  return text.size();
}

}  // namespace oryx::tokenizer
