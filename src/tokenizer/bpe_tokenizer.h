// The Tokenizer of a tokenizer.json: added tokens, normalizer, splitting, then BPE of each piece.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/splitter.h"
#include "tokenizer/tokenizer.h"

namespace oryx::tokenizer {

// What a tokenizer.json says.
struct TokenizerDefinition {
  std::string identity;
  BpeModel model;
  std::vector<std::pair<std::string, int32_t>> other_tokens;  // of the vocabulary, not made of byte symbols
  std::vector<AddedToken> added_tokens;
  bool nfc = false;
  std::vector<Splitter> splitters;  // one after the other
  // A text that does not start with a space gets one before splitter number `prefix_stage` sees it.
  bool add_prefix_space = false;
  size_t prefix_stage = 0;
};

class BpeTokenizer final : public Tokenizer {
 public:
  // Throws Error when two tokens share an id, or as Bpe does.
  explicit BpeTokenizer(TokenizerDefinition definition);
  ~BpeTokenizer() override;

  void encode_to(std::string_view text, bool allow_special, std::vector<int32_t>& ids) const override;
  std::string_view token_bytes(int32_t id) const override;
  std::optional<int32_t> find(std::string_view bytes) const override;
  bool is_special(int32_t id) const override;
  int32_t vocabulary_size() const override { return static_cast<int32_t>(tokens_.size()); }
  size_t safe_cut(std::string_view text) const override;

 private:
  class Encoder;
  struct Token {
    std::string bytes;
    bool present = false;
    bool special = false;
  };

  void add_token(const std::string& bytes, int32_t id, bool special);
  bool contains(int32_t id) const;
  void encode_between(std::string_view text, bool allow_special, Encoder& encoder) const;
  void encode_pieces(size_t stage, std::string_view text, Encoder& encoder) const;
  bool find_cuttable() const;

  TokenizerDefinition definition_;  // its vocabulary and merges have moved into bpe_
  Bpe bpe_;
  std::vector<Token> tokens_;  // by id
  std::unordered_map<std::string, int32_t> ids_;
  AddedTokenMatcher raw_, normalized_;
  bool cuttable_ = false;

  // Encoders not in use: each keeps its cache of pieces warm for the next text.
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Encoder>> idle_;
};

}  // namespace oryx::tokenizer
