#include "cli/model_tokenizer.h"

#include <filesystem>

#include "base/error.h"

namespace oryx::cli {

std::unique_ptr<const tokenizer::Tokenizer> load_tokenizer(const std::string& directory,
                                                           const model::ModelConfig& config) {
  const bool bytes = config.tokenizer == "bytes";
  const std::string source = bytes ? "bytes" : (std::filesystem::path(directory) / config.tokenizer).string();
  auto tokenizer = tokenizer::Tokenizer::load(source);
  expect(tokenizer->vocabulary_size() <= config.vocabulary,
         "{}: the tokenizer has {} ids, but the model's vocabulary only {}", source,
         tokenizer->vocabulary_size(), config.vocabulary);
  return tokenizer;
}

std::optional<int32_t> end_of_text(const tokenizer::Tokenizer& tokenizer) {
  try {
    return tokenizer.end_of_text();
  } catch (const Error&) {
    return std::nullopt;
  }
}

}  // namespace oryx::cli
