// Token shards: safetensors files with one tensor `tokens` [n] (uint16 where the vocabulary fits, else
// uint32) and metadata `tokenizer` (sha256 of its file, or "bytes"), `documents` and `vocabulary`. A
// directory is the concatenation of its *.safetensors files in name order; other files there are ignored.
// Documents end with an end-of-text token and may run on from one shard into the next; `documents` counts
// those that end.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "formats/safetensors.h"

namespace oryx::formats {

class AtomicFile;

// Read by mapping; safe to use from several threads.
class TokenShards {
 public:
  // One directory, or several as one sequence of tokens. A path may also name a single shard. Throws Error
  // for a missing or empty directory, shards without tokens, and shards of different tokenizers or
  // vocabularies.
  explicit TokenShards(const std::string& path) : TokenShards(std::vector<std::string>{path}) {}
  explicit TokenShards(const std::vector<std::string>& paths);

  int64_t size() const { return starts_.back(); }
  int64_t documents() const { return documents_; }
  int64_t vocabulary() const { return vocabulary_; }
  const std::string& tokenizer() const { return tokenizer_; }

  // Tokens begin … begin+count-1 into out[0 … count-1]. Throws Error past the end, and for a token that is
  // not below the vocabulary, naming its file and position.
  void copy(int64_t begin, int64_t count, int64_t* out) const;

  // Reads every token once and throws the Error of copy().
  void validate() const;

 private:
  struct Shard {
    std::string path;
    at::Tensor tokens;
  };

  void add(const std::string& path);

  std::vector<Shard> shards_;
  std::vector<int64_t> starts_{0};  // of each shard, and the total
  int64_t documents_ = 0, vocabulary_ = 0;
  std::string tokenizer_;
};

struct TokenShardOptions {
  std::string tokenizer;                          // sha256 of the tokenizer's file, or "bytes"
  int64_t vocabulary = 0;                         // every token lies below it
  int64_t tokens_per_shard = int64_t{128} << 20;  // 256 or 512 MiB a file
};

// Streams tokens into tokens-00000.safetensors, tokens-00001.safetensors, … of an existing directory that
// holds no safetensors files yet. Each shard appears whole; without finish() all of them are removed.
class TokenShardWriter {
 public:
  TokenShardWriter(std::filesystem::path directory, TokenShardOptions options);
  ~TokenShardWriter();
  TokenShardWriter(const TokenShardWriter&) = delete;
  TokenShardWriter& operator=(const TokenShardWriter&) = delete;

  // More of the current document. Throws Error for a token outside the vocabulary.
  void append(std::span<const int32_t> tokens);

  // What was appended last ended a document.
  void end_document();

  // Publishes the last shard. Throws Error where no token was appended.
  void finish();

  int64_t tokens() const { return tokens_; }
  int64_t documents() const { return documents_; }

 private:
  std::string header() const;
  void open_shard();
  void close_shard();

  std::filesystem::path directory_;
  TokenShardOptions options_;
  bool wide_;  // uint32
  std::unique_ptr<AtomicFile> shard_;
  std::vector<std::filesystem::path> published_;
  std::vector<std::byte> buffer_;
  int64_t shard_tokens_ = 0, shard_documents_ = 0;
  int64_t tokens_ = 0, documents_ = 0;
  bool finished_ = false;
};

}  // namespace oryx::formats
