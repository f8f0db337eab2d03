// The tokenizer of a model directory.
#pragma once

#include <memory>
#include <string>

#include "model/config.h"
#include "tokenizer/tokenizer.h"

namespace oryx::cli {

// As config.json says: bytes, or tokenizer.json beside it. Throws Error where the model's vocabulary has no
// room for its ids.
std::unique_ptr<const tokenizer::Tokenizer> load_tokenizer(const std::string& directory,
                                                           const model::ModelConfig& config);

}  // namespace oryx::cli
