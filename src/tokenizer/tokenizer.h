// Text <-> token ids. Two kinds: the 256 bytes themselves, and byte-level BPE read from a Hugging Face
// tokenizer.json (GPT-2, Llama-3, Qwen-2 and their like), whose ids equal those of the `tokenizers` package
// called with add_special_tokens=False. docs/tokenizer.md says what is supported and how bytes that are not
// UTF-8 are treated.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace oryx::tokenizer {

// Immutable after loading; every member may be called from several threads at once.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // `source` is "bytes" or the path of a tokenizer.json. Throws Error naming the file and what in it is
  // malformed or not supported.
  static std::unique_ptr<const Tokenizer> load(const std::string& source);

  // The ids of any bytes. With `allow_special` the texts of special tokens (`<|endoftext|>`) become their
  // ids; without, they are text like any other (the package's encode_special_tokens = True).
  std::vector<int32_t> encode(std::string_view text, bool allow_special = true) const;
  // The same, appended to `ids`.
  virtual void encode_to(std::string_view text, bool allow_special, std::vector<int32_t>& ids) const = 0;
  // Each text by itself, on `threads` threads.
  std::vector<std::vector<int32_t>> encode_all(std::span<const std::string_view> texts, bool allow_special,
                                               int threads) const;

  // The exact bytes, which need not be UTF-8. decode(encode(text)) == text unless the file asks for a
  // normalizer or a prefix space. Throws Error on an id without a token.
  std::string decode(std::span<const int32_t> ids) const;

  // The bytes of one token. Throws Error on an id without a token.
  virtual std::string_view token_bytes(int32_t id) const = 0;
  // The token of exactly these bytes.
  virtual std::optional<int32_t> find(std::string_view bytes) const = 0;
  // True for tokens marked special: they stand for no text of a document.
  virtual bool is_special(int32_t id) const = 0;
  // One more than the largest id: the rows a model's embedding needs.
  virtual int32_t vocabulary_size() const = 0;

  // `<|endoftext|>` (GPT-2, Qwen), `<|end_of_text|>` (Llama-3) or the like. Throws Error where there is none.
  int32_t end_of_text() const;

  // "bytes", or the SHA-256 of the file in hexadecimal.
  const std::string& identity() const { return identity_; }

  // A position inside `text` where it can be cut without changing its ids, whatever follows `text`:
  // encode(text + rest) == encode(text[0, cut)) + encode(text[cut, ...) + rest). The last one found, 0 when
  // none is known. Lets documents of any length be encoded in bounded memory.
  virtual size_t safe_cut(std::string_view text) const = 0;

 protected:
  explicit Tokenizer(std::string identity) : identity_(std::move(identity)) {}

 private:
  std::string identity_;
};

// Turns ids into text as they arrive: a UTF-8 sequence comes out when its last byte is there, bytes that
// cannot be part of one come out as they are. All returned strings together are decode(all ids).
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  std::string push(int32_t id);
  // What is left of an unfinished sequence.
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  std::string pending_;
};

}  // namespace oryx::tokenizer
