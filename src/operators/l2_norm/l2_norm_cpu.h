// CPU kernels of l2_norm on raw pointers.
#pragma once

#include <c10/core/ScalarType.h>

#include "operators/cpu/isa.h"

namespace oryx::operators {

// What is read, x forward and y backward, is [rows, heads, dim] with contiguous last dimension; everything
// else is contiguous.
struct L2NormVectors {
  at::ScalarType dtype;
  int64_t rows, heads, dim;
  const void* vectors;
  int64_t row_stride, head_stride;
};

struct L2NormForward : L2NormVectors {
  double eps;
  void* y;
  void* scale;  // [rows, heads] 1 / sqrt(Σ x² + eps), accumulate type; null when no gradient is needed
};

struct L2NormBackward : L2NormVectors {
  const void* scale;
  const void* dy;
  void* dx;
};

}  // namespace oryx::operators

ORYX_CPU_KERNEL(void, l2_norm_forward, (const operators::L2NormForward& arguments), (arguments))
ORYX_CPU_KERNEL(void, l2_norm_backward, (const operators::L2NormBackward& arguments), (arguments))
