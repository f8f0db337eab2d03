// "did you mean": the valid name closest to a mistyped one.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace oryx {

// Edits (insert, delete, replace, swap of neighbours) that turn one text into the other.
int edit_distance(std::string_view a, std::string_view b);

// The candidate with the fewest edits, the first of equals; "" for no candidates. A candidate that is
// `name` with a dotted prefix or without one counts as one edit.
std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates);

// "a", "b" or "c": for error messages.
std::string one_of(const std::vector<std::string>& names);

}  // namespace oryx
