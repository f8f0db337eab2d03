// The tokenizer of a model directory.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "model/config.h"
#include "tokenizer/tokenizer.h"

namespace oryx::cli {

// As config.json says: bytes, or tokenizer.json beside it. Throws Error where the model's vocabulary has no
// room for its ids.
std::unique_ptr<const tokenizer::Tokenizer> load_tokenizer(const std::string& directory,
                                                           const model::ModelConfig& config);

// The token after which a document ends, where the tokenizer has one.
std::optional<int32_t> end_of_text(const tokenizer::Tokenizer& tokenizer);

}  // namespace oryx::cli
