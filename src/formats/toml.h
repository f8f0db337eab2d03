// TOML text <-> base/value.h, recipes that build on other recipes, and overrides from the command line.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/value.h"

namespace oryx::formats {

// Throws Error "SOURCE:LINE: …" for malformed text, a key given twice, and dates, which no config uses.
Table parse_toml(std::string_view text, const std::string& source);
Table read_toml(const std::string& path);

// A recipe file. A top-level key base = "other.toml" (path relative to this file) names a recipe whose
// values this one overrides key by key, so that a variation only states its difference; bases chain. The
// result no longer holds `base`. Throws Error for a missing base and for a chain that runs in a circle.
Table read_recipe(const std::string& path);

// Applies "section.key=value" on a tree, the later over the earlier. The value is read as TOML; anything
// that is none (a bare word, a path, a schedule) is a string. Throws UsageError for text of another form.
// Whether the key exists is found out by read_fields, which names the command line as its source.
void apply_overrides(Table& root, const std::vector<std::string>& overrides);

// Top-level values first, then a [section] for each table; inside sections, keys with dots stay dotted.
std::string to_toml(const Table& table);

}  // namespace oryx::formats
