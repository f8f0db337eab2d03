// Schedules made of equal chunks, shared by the text forms and the training draws.
#pragma once

#include <algorithm>
#include <cstdint>

#include "schedule/spans.h"

namespace oryx::schedule {

// mode_of(i) is the mode of chunk i, which covers tokens i·chunk … (i+1)·chunk - 1 as far as `length` goes.
template <class ModeOf>
ModeSpans chunked_spans(int64_t length, int64_t chunk, const ModeOf& mode_of) {
  ModeSpans spans;
  uint64_t index = 0;
  for (int64_t begin = 0; begin < length; ++index) {
    const int64_t end = begin + std::min(chunk, length - begin);
    const Mode mode = mode_of(index);
    if (!spans.empty() && spans.back().mode == mode) {
      spans.back().end = end;
    } else {
      spans.push_back({begin, end, mode});
    }
    begin = end;
  }
  return spans;
}

}  // namespace oryx::schedule
