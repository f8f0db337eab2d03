// SHA-256 (FIPS 180-4), the identity of a tokenizer file.
#pragma once

#include <string>
#include <string_view>

namespace oryx::tokenizer {

// 64 hexadecimal digits.
std::string sha256_hex(std::string_view bytes);

}  // namespace oryx::tokenizer
