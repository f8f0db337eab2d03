#include "tokenizer/tokenizer.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "base/error.h"
#include "tokenizer/byte_tokenizer.h"
#include "tokenizer/hugging_face.h"
#include "tokenizer/unicode.h"

namespace oryx::tokenizer {

std::unique_ptr<const Tokenizer> Tokenizer::load(const std::string& source) {
  if (source == "bytes") return std::make_unique<ByteTokenizer>();
  return load_hugging_face(source);
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool allow_special) const {
  std::vector<int32_t> ids;
  encode_to(text, allow_special, ids);
  return ids;
}

std::vector<std::vector<int32_t>> Tokenizer::encode_all(std::span<const std::string_view> texts,
                                                        bool allow_special, int threads) const {
  std::vector<std::vector<int32_t>> ids(texts.size());
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    try {
      for (size_t i; (i = next++) < texts.size();) encode_to(texts[i], allow_special, ids[i]);
    } catch (...) {
      const std::lock_guard lock(error_mutex);
      error = std::current_exception();
      next = texts.size();
    }
  };
  {
    std::vector<std::jthread> others;
    const size_t wanted = std::min(texts.size(), static_cast<size_t>(std::max(threads, 1)));
    for (size_t i = 1; i < wanted; ++i) others.emplace_back(work);
    work();
  }
  if (error) std::rethrow_exception(error);
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  for (const int32_t id : ids) text += token_bytes(id);
  return text;
}

int32_t Tokenizer::end_of_text() const {
  for (const char* name : {"<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>"}) {
    if (const auto id = find(name)) return *id;
  }
  fail(
      "the tokenizer has no end-of-text token: expected one of <|endoftext|>, <|end_of_text|>, <|eot_id|>, "
      "</s>, <eos>");
}

std::string StreamDecoder::push(int32_t id) {
  pending_ += tokenizer_.token_bytes(id);
  const size_t complete = complete_prefix(pending_);
  std::string out = pending_.substr(0, complete);
  pending_.erase(0, complete);
  return out;
}

std::string StreamDecoder::finish() { return std::exchange(pending_, {}); }

}  // namespace oryx::tokenizer
