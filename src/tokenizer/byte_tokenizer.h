// The built-in tokenizer "bytes": ids 0 to 255 are the bytes, 256 is the end of a text.
#pragma once

#include "tokenizer/tokenizer.h"

namespace oryx::tokenizer {

class ByteTokenizer final : public Tokenizer {
 public:
  ByteTokenizer() : Tokenizer("bytes") {}

  void encode_to(std::string_view text, bool allow_special, std::vector<int32_t>& ids) const override;
  std::string_view token_bytes(int32_t id) const override;
  std::optional<int32_t> find(std::string_view bytes) const override;
  bool is_special(int32_t id) const override { return id == kEndOfText; }
  int32_t vocabulary_size() const override { return 257; }
  size_t safe_cut(std::string_view text) const override;

 private:
  static constexpr int32_t kEndOfText = 256;
};

}  // namespace oryx::tokenizer
