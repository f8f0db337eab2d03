// JSON text <-> base/value.h.
#pragma once

#include <string>
#include <string_view>

#include "base/value.h"

namespace oryx::formats {

// Throws Error naming `source` (a file name or what the text is) for malformed text, keys given twice,
// nesting deeper than 128, and integers past 64 bits. Bytes after the value other than blanks are an error.
Value parse_json(std::string_view text, const std::string& source);

// The same from a file, whose top must be an object.
Table read_json(const std::string& path);

// `indent` spaces a level, or one line for -1. Numbers read back exactly; invalid UTF-8 in a string becomes
// U+FFFD. Throws Error for a number that is not finite, which JSON cannot hold.
std::string to_json(const Value& value, int indent = -1);
std::string to_json(const Table& table, int indent = -1);

}  // namespace oryx::formats
