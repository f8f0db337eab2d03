// Matrix–vector products at memory speed, on raw pointers.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "operators/cpu/isa.h"

namespace oryx::operators {

// y[r, o] = Σ_i x[first + r, i] weight[o, i] for a few rows; all tensors contiguous.
struct FewRows {
  const void* weight;  // [outputs, inputs]
  int64_t outputs;
  int64_t first, count;  // rows of x
  void* y;               // [count, outputs]
};

}  // namespace oryx::operators

// Several weights over one x [rows, inputs] of `dtype` in one parallel region; weights and y have that dtype
// too.
ORYX_CPU_KERNEL(void, linear_few_rows,
                (at::ScalarType dtype, const void* x, int64_t rows, int64_t inputs,
                 const operators::FewRows* products, int64_t count),
                (dtype, x, rows, inputs, products, count))
