// The schedules that training draws: each chunk of a sequence is attention with a fixed probability.
#pragma once

#include <cstdint>

#include "schedule/spans.h"

namespace oryx::schedule {

struct TrainingDraw {
  double attention_probability = 0.25;  // in [0, 1]
  int64_t chunk = 128;                  // tokens that share one draw
  bool per_sequence = false;            // one draw for the whole sequence instead
};

// Throws Error naming the field that is out of range.
void validate(const TrainingDraw& draw);

// The schedule of sequence `sequence` (its index in the data order) at optimizer step `step`: a pure
// function of its arguments, so nothing about it need be stored in a checkpoint.
ModeSpans draw(const TrainingDraw& draw, int64_t length, uint64_t seed, uint64_t step, uint64_t sequence);

}  // namespace oryx::schedule
