#include "formats/token_shards.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cstring>

#include "base/error.h"
#include "formats/file.h"

namespace oryx::formats {
namespace {

namespace fs = std::filesystem;

// Every header of a shard is padded to this, so that it can be written anew once the counts are known.
constexpr size_t kHeaderBytes = 512;
constexpr int64_t kLargestVocabulary = int64_t{1} << 31;  // ids are int32 elsewhere

std::vector<std::string> shard_paths(const std::string& path) {
  if (fs::is_regular_file(path)) return {path};
  expect(fs::is_directory(path), "{}: no such directory of token shards", path);
  std::vector<std::string> paths;
  for (const fs::directory_entry& entry : fs::directory_iterator(path)) {
    if (entry.path().extension() == ".safetensors") paths.push_back(entry.path().string());
  }
  expect(!paths.empty(), "{}: holds no token shards (*.safetensors); oryx prepare writes them", path);
  std::sort(paths.begin(), paths.end());
  return paths;
}

const std::string& metadata_text(const SafetensorsFile& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  expect(found != file.metadata().end(), "{}: expected token shards with metadata {}", file.path(), key);
  return found->second;
}

int64_t metadata_count(const SafetensorsFile& file, const std::string& key) {
  const std::string& text = metadata_text(file, key);
  int64_t count = -1;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  expect(error == std::errc{} && stop == text.data() + text.size() && count >= 0,
         "{}: expected a count in metadata {}, got \"{}\"", file.path(), key, text);
  return count;
}

// Widens and returns the largest.
template <class Stored>
int64_t widen(const Stored* tokens, int64_t count, int64_t* out) {
  Stored largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = tokens[i];
    largest = std::max(largest, tokens[i]);
  }
  return static_cast<int64_t>(largest);
}

}  // namespace

TokenShards::TokenShards(const std::vector<std::string>& paths) {
  expect(!paths.empty(), "expected at least one directory of token shards, got none");
  for (const std::string& path : paths) {
    for (const std::string& shard : shard_paths(path)) add(shard);
  }
  std::string names = paths.front();
  for (size_t i = 1; i < paths.size(); ++i) names += ", " + paths[i];
  expect(size() > 0, "{}: holds no tokens", names);
}

void TokenShards::add(const std::string& path) {
  const SafetensorsFile file(path);
  const at::Tensor tokens = file.tensor("tokens");
  const bool known_type = tokens.scalar_type() == at::kUInt16 || tokens.scalar_type() == at::kUInt32;
  expect(known_type && tokens.dim() == 1, "{}: expected tokens [n] of type uint16 or uint32, got [{}] of {}",
         path, fmt::join(tokens.sizes(), ", "), c10::toString(tokens.scalar_type()));
  const std::string& tokenizer = metadata_text(file, "tokenizer");
  const int64_t vocabulary = metadata_count(file, "vocabulary");
  expect(vocabulary >= 1 && vocabulary <= kLargestVocabulary, "{}: expected a vocabulary of 1 … 2^31, got {}",
         path, vocabulary);
  if (shards_.empty()) {
    tokenizer_ = tokenizer;
    vocabulary_ = vocabulary;
  }
  expect(tokenizer == tokenizer_, "{}: tokenizer {} is not that of {}: {}", path, tokenizer,
         shards_.empty() ? path : shards_.front().path, tokenizer_);
  expect(vocabulary == vocabulary_, "{}: vocabulary {} is not that of {}: {}", path, vocabulary,
         shards_.empty() ? path : shards_.front().path, vocabulary_);
  documents_ += metadata_count(file, "documents");
  starts_.push_back(starts_.back() + tokens.numel());
  shards_.push_back({path, tokens});
}

void TokenShards::copy(int64_t begin, int64_t count, int64_t* out) const {
  expect(begin >= 0 && count >= 0 && begin <= size() && count <= size() - begin,
         "expected tokens inside the {} of {}, got {} from {}", size(), shards_.front().path, count, begin);
  size_t shard = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
  for (; count > 0; ++shard) {
    const at::Tensor& tokens = shards_[shard].tokens;
    const int64_t offset = begin - starts_[shard];
    const int64_t piece = std::min(count, tokens.numel() - offset);
    const int64_t largest =
        tokens.scalar_type() == at::kUInt16
            ? widen(static_cast<const uint16_t*>(tokens.const_data_ptr()) + offset, piece, out)
            : widen(static_cast<const uint32_t*>(tokens.const_data_ptr()) + offset, piece, out);
    if (largest >= vocabulary_) {
      const int64_t at = std::find_if(out, out + piece, [&](int64_t id) { return id >= vocabulary_; }) - out;
      fail("{}: token {} at position {} is not below the vocabulary {}", shards_[shard].path, out[at],
           offset + at, vocabulary_);
    }
    begin += piece;
    out += piece;
    count -= piece;
  }
}

void TokenShards::validate() const {
  constexpr int64_t kPiece = 1 << 16;
  std::vector<int64_t> tokens(kPiece);
  for (int64_t begin = 0; begin < size(); begin += kPiece) {
    copy(begin, std::min(kPiece, size() - begin), tokens.data());
  }
}

TokenShardWriter::TokenShardWriter(fs::path directory, TokenShardOptions options)
    : directory_(std::move(directory)), options_(std::move(options)), wide_(options_.vocabulary > 65536) {
  expect(options_.vocabulary >= 1 && options_.vocabulary <= kLargestVocabulary,
         "expected a vocabulary of 1 … 2^31, got {}", options_.vocabulary);
  expect(options_.tokens_per_shard >= 1, "expected shards of at least 1 token, got {}",
         options_.tokens_per_shard);
  expect(fs::is_directory(directory_), "cannot write token shards into {}: no such directory",
         directory_.string());
  for (const fs::directory_entry& entry : fs::directory_iterator(directory_)) {
    expect(entry.path().extension() != ".safetensors",
           "cannot write token shards into {}: it holds {} already", directory_.string(),
           entry.path().filename().string());
  }
}

TokenShardWriter::~TokenShardWriter() {
  if (finished_) return;
  std::error_code ignored;
  for (const fs::path& path : published_) fs::remove(path, ignored);
}

std::string TokenShardWriter::header() const {
  const uint64_t bytes = static_cast<uint64_t>(shard_tokens_) * (wide_ ? 4 : 2);
  return safetensors_header({{"tokens", {wide_ ? at::kUInt32 : at::kUInt16, {shard_tokens_}, 0, bytes}}},
                            {{"tokenizer", options_.tokenizer},
                             {"documents", std::to_string(shard_documents_)},
                             {"vocabulary", std::to_string(options_.vocabulary)}},
                            kHeaderBytes);
}

void TokenShardWriter::open_shard() {
  const fs::path path = directory_ / fmt::format("tokens-{:05}.safetensors", published_.size());
  shard_ = std::make_unique<AtomicFile>(path.string());
  published_.push_back(path);
  shard_tokens_ = shard_documents_ = 0;
  const std::string placeholder = header();
  expect(placeholder.size() == kHeaderBytes, "expected a short tokenizer name, got {}", options_.tokenizer);
  shard_->write(placeholder);
}

void TokenShardWriter::close_shard() {
  shard_->rewrite_start(header());
  shard_->commit();
  shard_.reset();
}

void TokenShardWriter::append(std::span<const int32_t> tokens) {
  for (const int32_t token : tokens) {
    expect(token >= 0 && token < options_.vocabulary, "token {} is not below the vocabulary {}", token,
           options_.vocabulary);
  }
  while (!tokens.empty()) {
    // A full shard stays open until more tokens come: a document that ends with it still counts there.
    if (shard_ && shard_tokens_ == options_.tokens_per_shard) close_shard();
    if (!shard_) open_shard();
    const size_t piece = std::min<size_t>(tokens.size(), options_.tokens_per_shard - shard_tokens_);
    buffer_.resize(piece * (wide_ ? 4 : 2));
    if (wide_) {
      std::memcpy(buffer_.data(), tokens.data(), buffer_.size());
    } else {
      uint16_t* narrow = reinterpret_cast<uint16_t*>(buffer_.data());
      for (size_t i = 0; i < piece; ++i) narrow[i] = static_cast<uint16_t>(tokens[i]);
    }
    shard_->write(buffer_.data(), buffer_.size());
    shard_tokens_ += static_cast<int64_t>(piece);
    tokens_ += static_cast<int64_t>(piece);
    tokens = tokens.subspan(piece);
  }
}

void TokenShardWriter::end_document() {
  expect(shard_ != nullptr, "expected a document with tokens before its end");
  ++shard_documents_;
  ++documents_;
}

void TokenShardWriter::finish() {
  expect(tokens_ > 0, "expected text to prepare, got none: no token was written");
  close_shard();
  finished_ = true;
}

}  // namespace oryx::formats
