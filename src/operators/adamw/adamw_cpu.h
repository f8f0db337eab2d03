// CPU kernels of adamw on raw pointers.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "operators/cpu/isa.h"

namespace oryx::operators {

// A piece of one tensor: the unit of work. A null gradient is zero.
struct AdamwChunk {
  at::ScalarType dtype;
  int64_t count;
  void* parameter;
  const void* gradient;
  void *first_moment, *second_moment;
  double decay;  // 1 − learning_rate · weight_decay
};

struct AdamwFactors {
  double beta1, beta2, eps, gradient_scale;
  double step_size;   // learning_rate / (1 − beta1^step)
  double correction;  // 1 / sqrt(1 − beta2^step)
};

struct NormChunk {
  at::ScalarType dtype;
  int64_t count;
  const void* gradient;
  double sum;  // out: Σ g²
};

}  // namespace oryx::operators

ORYX_CPU_KERNEL(void, adamw_update,
                (const operators::AdamwChunk* chunks, int64_t count, const operators::AdamwFactors& factors),
                (chunks, count, factors))
ORYX_CPU_KERNEL(void, sum_squares, (operators::NormChunk * chunks, int64_t count), (chunks, count))
