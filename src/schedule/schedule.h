// A schedule as text: which mixer serves which tokens of a sequence.
//
//   SCHEDULE := FORM | SPAN { "," SPAN }         SPAN := MODE [ "@" START ]       MODE := attention | linear
//   START    := token index | percent of the known length, rounded down ("97.5%") | "-N": N tokens before
//               the end of the known length | "generation": the first token after the known length
//   FORM     := every(N) | random(P) | random(P,SEED)      each with an optional argument chunk=128
//
// every(N): the N-th, 2N-th, … chunk is attention, the others linear. random(P): each chunk is attention
// with probability P; the draw depends on SEED (default 0) and the chunk's index only.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "schedule/spans.h"

namespace oryx::schedule {

// An immutable value.
class Schedule {
 public:
  // Throws UsageError naming the piece that is wrong and what was expected there.
  static Schedule parse(std::string_view text);

  // The canonical text: no blanks, and every default that changes the meaning spelled out.
  const std::string& text() const { return text_; }

  // The modes of tokens 0 … total_length-1 of a sequence whose first `known_length` tokens (the prompt, or
  // the whole sequence) are known: total_length >= known_length >= 0. A start past total_length is never
  // reached. Throws UsageError, naming both, where a start does not lie after the one before it, and
  // where "-N" reaches back past the first token.
  ModeSpans spans(int64_t known_length, int64_t total_length) const;

  bool operator==(const Schedule& other) const { return text_ == other.text_; }

 private:
  struct Start {
    enum class Kind { index, percent, before_end, generation } kind;
    int64_t value;      // index: the token; percent: the numerator; before_end: minus the distance
    int64_t scale = 1;  // percent: the start is known_length · value / scale
    std::string text;
  };
  struct Span {
    Mode mode;
    Start start;
    std::string text;
  };
  struct Every {
    int64_t period, chunk;
  };
  struct Random {
    double probability;
    uint64_t seed;
    int64_t chunk;
  };
  friend class ScheduleParser;

  Schedule() = default;
  ModeSpans explicit_spans(const std::vector<Span>& spans, int64_t known_length, int64_t total_length) const;

  std::string text_;
  std::variant<std::vector<Span>, Every, Random> form_;
};

}  // namespace oryx::schedule
