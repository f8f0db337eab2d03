// CPU kernel of cross_entropy on raw pointers.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "operators/cpu/isa.h"

namespace oryx::operators {

// For every row r of logits [rows, columns], contiguous: losses[r] = logsumexp − logit of the target, in the
// accumulate type; with `gradient` the logits become scale · d losses[r] / d logits. Rows with a negative
// target have loss and gradient zero.
struct SoftmaxLoss {
  at::ScalarType dtype;
  int64_t rows, columns;
  void* logits;
  const int64_t* targets;
  void* losses;
  double scale;
  bool gradient;
};

}  // namespace oryx::operators

ORYX_CPU_KERNEL(void, softmax_loss, (const operators::SoftmaxLoss& arguments), (arguments))
