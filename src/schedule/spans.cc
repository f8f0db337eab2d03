#include "schedule/spans.h"

#include <algorithm>

#include "base/error.h"

namespace oryx::schedule {

std::string_view mode_name(Mode mode) { return mode == Mode::attention ? "attention" : "linear"; }

ModeSpans cut(const ModeSpans& spans, int64_t begin, int64_t end) {
  expect(begin <= end, "expected a piece of a schedule that runs forwards, got tokens {} to {}", begin, end);
  ModeSpans piece;
  if (begin == end) return piece;
  expect(!spans.empty() && spans.front().begin <= begin && end <= spans.back().end,
         "expected a piece inside the schedule's tokens {} to {}, got {} to {}",
         spans.empty() ? 0 : spans.front().begin, spans.empty() ? 0 : spans.back().end, begin, end);
  auto span =
      std::partition_point(spans.begin(), spans.end(), [&](const ModeSpan& s) { return s.end <= begin; });
  for (; span != spans.end() && span->begin < end; ++span) {
    piece.push_back({std::max(span->begin, begin), std::min(span->end, end), span->mode});
  }
  return piece;
}

ModeSpans merge(const ModeSpans& spans) {
  ModeSpans merged;
  for (size_t i = 0; i < spans.size(); ++i) {
    const ModeSpan& span = spans[i];
    expect(span.begin <= span.end && (i == 0 || spans[i - 1].end == span.begin),
           "expected spans that follow each other, got tokens {} to {} after {}", span.begin, span.end,
           i == 0 ? span.begin : spans[i - 1].end);
    if (span.begin == span.end) continue;
    if (!merged.empty() && merged.back().mode == span.mode) {
      merged.back().end = span.end;
    } else {
      merged.push_back(span);
    }
  }
  return merged;
}

int64_t attention_tokens(const ModeSpans& spans) {
  int64_t tokens = 0;
  for (const ModeSpan& span : spans) {
    if (span.mode == Mode::attention) tokens += span.end - span.begin;
  }
  return tokens;
}

int64_t total_tokens(const ModeSpans& spans) {
  return spans.empty() ? 0 : spans.back().end - spans.front().begin;
}

double attention_share(const ModeSpans& spans) {
  const int64_t total = total_tokens(spans);
  return total == 0 ? 0 : static_cast<double>(attention_tokens(spans)) / static_cast<double>(total);
}

}  // namespace oryx::schedule
