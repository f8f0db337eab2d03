#include "base/nearest_name.h"

#include <fmt/format.h>

#include <algorithm>
#include <climits>

namespace oryx {
namespace {

bool is_dotted_suffix(std::string_view whole, std::string_view suffix) {
  return whole.size() > suffix.size() + 1 && whole.ends_with(suffix) &&
         whole[whole.size() - suffix.size() - 1] == '.';
}

}  // namespace

int edit_distance(std::string_view a, std::string_view b) {
  // Three rows of the optimal string alignment table: a swap looks back two.
  std::vector<int> before(b.size() + 1), last(b.size() + 1), row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    before.swap(last);
    last.swap(row);
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        row[j] = std::min(row[j], before[j - 2] + 1);
    }
  }
  return row[b.size()];
}

std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates) {
  std::string nearest;
  int fewest = INT_MAX;
  for (const std::string& candidate : candidates) {
    int edits = edit_distance(name, candidate);
    if (is_dotted_suffix(candidate, name) || is_dotted_suffix(name, candidate)) edits = std::min(edits, 1);
    if (edits >= fewest) continue;
    fewest = edits;
    nearest = candidate;
  }
  return nearest;
}

std::string one_of(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) {
    if (i > 0) text += i + 1 == names.size() ? " or " : ", ";
    text += fmt::format("\"{}\"", names[i]);
  }
  return text;
}

}  // namespace oryx
