// Which mixer answers each token: runs of tokens with one mode, in absolute positions of a sequence.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace oryx::schedule {

enum class Mode : uint8_t { attention, linear };

// "attention" or "linear".
std::string_view mode_name(Mode mode);

struct ModeSpan {
  int64_t begin, end;  // tokens begin … end-1
  Mode mode;
  bool operator==(const ModeSpan&) const = default;
};

// Ascending, without gaps; none of the functions of this room returns an empty span, or two neighbours of one
// mode.
using ModeSpans = std::vector<ModeSpan>;

// The piece [begin, end) of a schedule, still in absolute positions. Error unless spans cover it.
ModeSpans cut(const ModeSpans& spans, int64_t begin, int64_t end);

// Drops empty spans and joins neighbours of one mode. Error where spans leave a gap, overlap or run
// backwards.
ModeSpans merge(const ModeSpans& spans);

int64_t attention_tokens(const ModeSpans& spans);
int64_t total_tokens(const ModeSpans& spans);

// The fraction of tokens served by attention; 0 for no tokens.
double attention_share(const ModeSpans& spans);

}  // namespace oryx::schedule
