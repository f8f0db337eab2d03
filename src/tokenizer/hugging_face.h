// Reads Hugging Face's tokenizer.json.
#pragma once

#include <memory>
#include <string>

#include "tokenizer/tokenizer.h"

namespace oryx::tokenizer {

// Throws Error "FILE: …" when the file cannot be read, is malformed, or asks for something not supported,
// which the message names. Truncation, padding and post-processors (tokens around a text) are ignored.
std::unique_ptr<const Tokenizer> load_hugging_face(const std::string& path);

}  // namespace oryx::tokenizer
