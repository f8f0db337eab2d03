// Matrix–vector products at memory speed, on raw pointers.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "operators/cpu/isa.h"

namespace oryx::operators {

// y[r, o] = Σ_i x[rows[r], i] weight[o, i] for a few rows; all tensors contiguous.
struct FewRows {
  const void* weight;  // [outputs, inputs]
  int64_t outputs;
  const int64_t* rows;  // [count] into x, or null for 0 … count-1
  int64_t count;
  void* y;  // [count, outputs]
};

}  // namespace oryx::operators

// Several weights over one x [rows, inputs] of `dtype` in one parallel region; weights and y have that dtype
// too.
ORYX_CPU_KERNEL(void, linear_few_rows,
                (at::ScalarType dtype, const void* x, int64_t rows, int64_t inputs,
                 const operators::FewRows* products, int64_t count),
                (dtype, x, rows, inputs, products, count))
// to[rows[r], c] += from[r, c] for c < columns; float32 or float64; in the order of r.
ORYX_CPU_KERNEL(void, linear_add_rows,
                (at::ScalarType dtype, const void* from, const int64_t* rows, int64_t count, int64_t columns,
                 void* to),
                (dtype, from, rows, count, columns, to))
