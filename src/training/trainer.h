// The training loop: steps, validation, checkpoints, and the order in which they happen.
#pragma once

#include <c10/core/Device.h>

#include <atomic>
#include <map>
#include <optional>
#include <string>

#include "training/process_group.h"
#include "training/recipe.h"

namespace oryx::training {

struct Outcome {
  int64_t steps = 0;              // updates made, those of earlier runs included
  int64_t tokens = 0;             // tokens seen
  bool interrupted = false;       // stopped early because it was asked to; everything is saved
  bool already_finished = false;  // there was nothing left to do
  std::optional<double> loss;     // of the last step
  std::map<std::string, double> validation_loss;  // by mode, at the end; empty without validation data
  std::filesystem::path model;                    // the newest checkpoint
};

// Trains as `recipe` says, or goes on where its run directory stops: then the result is, bit for bit, that of
// one uninterrupted run (same machine, same number of threads). Once `stop` is set, the step under way is
// finished and saved, and training ends. Throws Error on data, weights or a run directory that do not fit the
// recipe; on a loss or gradient that is not finite, before it reaches the weights; and when the disk is full.
// The newest complete checkpoint stays as it is in all these cases.
//
// With a group, which must have been started on `device`, the ranks share the sequences of every batch and of
// the validations; the result is that of one rank but for the order of sums. Rank 0 alone reads and writes
// the run directory and logs; the Outcome of the others only says whether they were interrupted. A request to
// stop on any rank stops all of them.
Outcome train(const Recipe& recipe, c10::Device device, const std::atomic<bool>& stop,
              ProcessGroup* group = nullptr);

}  // namespace oryx::training
