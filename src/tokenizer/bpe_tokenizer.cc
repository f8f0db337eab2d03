#include "tokenizer/bpe_tokenizer.h"

#include <cstring>

#include "base/error.h"
#include "tokenizer/unicode.h"

namespace oryx::tokenizer {

// Collects the ids of one text, remembering those of short pieces.
class BpeTokenizer::Encoder {
 public:
  explicit Encoder(const Bpe& bpe) : bpe_(bpe) {}

  void begin(std::vector<int32_t>& ids) { ids_ = &ids; }
  void finish() { flush(); }

  void add_id(int32_t id) {
    buffer_[used_++] = id;
    if (used_ >= kBuffer) flush();
  }

  // `text_end`: the end of the text that `piece` is part of.
  void add_piece(std::string_view piece, const char* text_end) {
    if (piece.size() > PieceCache::kMaxBytes) {
      flush();
      bpe_.encode(piece, workspace_, *ids_);
      if (piece.size() > kKeptWorkspace) workspace_ = {};
      return;
    }
    const PieceCache::Key key = PieceCache::key_of(piece, text_end);
    PieceCache::Entry& entry = cache_.entry(key);
    if (!PieceCache::same(entry.key, key)) {
      fresh_.clear();
      bpe_.encode(piece, workspace_, fresh_);
      if (fresh_.size() > PieceCache::kMaxIds) {
        flush();
        ids_->insert(ids_->end(), fresh_.begin(), fresh_.end());
        return;
      }
      entry.key = key;
      entry.count = static_cast<uint32_t>(fresh_.size());
      std::copy(fresh_.begin(), fresh_.end(), entry.ids.begin());
    }
    std::memcpy(buffer_.data() + used_, entry.ids.data(), sizeof(entry.ids));
    used_ += entry.count;
    if (used_ >= kBuffer) flush();
  }

 private:
  static constexpr size_t kBuffer = 1024;
  static constexpr size_t kKeptWorkspace = 1 << 16;  // an idle encoder keeps no buffers for longer pieces

  void flush() {
    ids_->insert(ids_->end(), buffer_.begin(), buffer_.begin() + used_);
    used_ = 0;
  }

  const Bpe& bpe_;
  Bpe::Workspace workspace_;
  PieceCache cache_;
  std::vector<int32_t> fresh_;
  std::vector<int32_t>* ids_ = nullptr;
  size_t used_ = 0;
  std::array<int32_t, kBuffer + PieceCache::kMaxIds> buffer_;  // whole cache entries are copied into it
};

BpeTokenizer::BpeTokenizer(TokenizerDefinition definition)
    : Tokenizer(definition.identity), definition_(std::move(definition)), bpe_(definition_.model) {
  for (const auto& [bytes, id] : definition_.model.vocabulary) add_token(bytes, id, false);
  for (const auto& [bytes, id] : definition_.other_tokens) add_token(bytes, id, false);
  std::vector<AddedToken> raw, normalized;
  for (const AddedToken& token : definition_.added_tokens) {
    add_token(token.content, token.id, token.special);
    if (token.normalized) {
      std::string storage;
      AddedToken pattern = token;
      if (definition_.nfc) pattern.content = normalize_nfc(token.content, storage);
      normalized.push_back(std::move(pattern));
    } else {
      raw.push_back(token);
    }
  }
  raw_ = AddedTokenMatcher(std::move(raw));
  normalized_ = AddedTokenMatcher(std::move(normalized));
  cuttable_ = find_cuttable();
  definition_.model = BpeModel{};
  definition_.other_tokens.clear();
}

BpeTokenizer::~BpeTokenizer() = default;

void BpeTokenizer::add_token(const std::string& bytes, int32_t id, bool special) {
  if (static_cast<size_t>(id) >= tokens_.size()) tokens_.resize(static_cast<size_t>(id) + 1);
  Token& token = tokens_[id];
  expect(!token.present || token.bytes == bytes, "tokens '{}' and '{}' have the same id {}", token.bytes,
         bytes, id);
  const auto [place, inserted] = ids_.emplace(bytes, id);
  expect(inserted || place->second == id, "token '{}' has the ids {} and {}", bytes, place->second, id);
  token = {bytes, true, token.special || special};
}

// Cutting is safe with one of the known patterns and no added token that could reach over the cut or take
// white space beside it. safe_cut() says where.
bool BpeTokenizer::find_cuttable() const {
  if (definition_.splitters.size() != 1 || !definition_.splitters[0].is_hand_written() ||
      definition_.add_prefix_space) {
    return false;
  }
  for (const AddedToken& token : definition_.added_tokens) {
    if (token.strip_left || token.strip_right || token.content.find_first_of(" \n") != std::string::npos) {
      return false;
    }
  }
  return true;
}

void BpeTokenizer::encode_to(std::string_view text, bool allow_special, std::vector<int32_t>& ids) const {
  std::unique_ptr<Encoder> encoder;
  {
    const std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      encoder = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (encoder == nullptr) encoder = std::make_unique<Encoder>(bpe_);
  encoder->begin(ids);
  raw_.for_each(text, allow_special, [&](std::string_view part, const AddedToken* token) {
    if (token != nullptr) {
      encoder->add_id(token->id);
    } else {
      encode_between(part, allow_special, *encoder);
    }
  });
  encoder->finish();
  const std::lock_guard lock(mutex_);
  idle_.push_back(std::move(encoder));
}

void BpeTokenizer::encode_between(std::string_view text, bool allow_special, Encoder& encoder) const {
  std::string storage;
  if (definition_.nfc) text = normalize_nfc(text, storage);
  normalized_.for_each(text, allow_special, [&](std::string_view part, const AddedToken* token) {
    if (token != nullptr) {
      encoder.add_id(token->id);
    } else {
      encode_pieces(0, part, encoder);
    }
  });
}

void BpeTokenizer::encode_pieces(size_t stage, std::string_view text, Encoder& encoder) const {
  std::string prefixed;
  if (definition_.add_prefix_space && stage == definition_.prefix_stage && text.front() != ' ') {
    prefixed.reserve(text.size() + 1);
    prefixed += ' ';
    prefixed += text;
    text = prefixed;
  }
  const std::vector<Splitter>& splitters = definition_.splitters;
  const char* const end = text.data() + text.size();
  const bool prefix_follows = definition_.add_prefix_space && stage < definition_.prefix_stage;
  if (stage == splitters.size()) {
    encoder.add_piece(text, end);
  } else if (stage + 1 == splitters.size() && !prefix_follows) {
    splitters[stage].for_each(text, [&](std::string_view piece) { encoder.add_piece(piece, end); });
  } else {
    splitters[stage].for_each(text,
                              [&](std::string_view piece) { encode_pieces(stage + 1, piece, encoder); });
  }
}

bool BpeTokenizer::contains(int32_t id) const {
  return id >= 0 && static_cast<size_t>(id) < tokens_.size() && tokens_[id].present;
}

std::string_view BpeTokenizer::token_bytes(int32_t id) const {
  expect(contains(id), "token id {} is not in the tokenizer's vocabulary of {}", id, tokens_.size());
  return tokens_[id].bytes;
}

std::optional<int32_t> BpeTokenizer::find(std::string_view bytes) const {
  const auto found = ids_.find(std::string(bytes));
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

bool BpeTokenizer::is_special(int32_t id) const { return contains(id) && tokens_[id].special; }

// Two places where each known pattern starts a new piece, whatever is around them, and where the end of the
// text instead of what follows does not change the piece before:
//   a|_b       before a space between two ASCII letters (no piece goes on from a letter to a space);
//   x\n|y      after a line feed between two characters that are not white space (a run of one is one piece).
// NFC changes nothing across them: neither a space nor a line feed composes with its neighbours.
size_t BpeTokenizer::safe_cut(std::string_view text) const {
  if (!cuttable_) return 0;
  const auto is_letter = [&](size_t i) { return (text[i] | 0x20) >= 'a' && (text[i] | 0x20) <= 'z'; };
  const auto is_space_before = [&](size_t end) {
    size_t begin = end - 1;
    while (begin > 0 && end - begin < 4 && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
    const Character character = decode_character(text.data() + begin, text.data() + end);
    return begin + character.size == end && character_class(character.code) == CharacterClass::kSpace;
  };
  for (size_t cut = text.size(); cut-- > 1;) {
    if (cut + 1 < text.size() && text[cut] == ' ' && is_letter(cut - 1) && is_letter(cut + 1)) return cut;
    if (cut >= 2 && text[cut - 1] == '\n' && !is_space_before(cut - 1)) {
      const Character next = decode_character(text.data() + cut, text.data() + text.size());
      if (next.code != kInvalidByte && character_class(next.code) != CharacterClass::kSpace) return cut;
    }
  }
  return 0;
}

}  // namespace oryx::tokenizer
