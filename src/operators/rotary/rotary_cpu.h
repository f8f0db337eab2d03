// CPU kernel of rotary on raw pointers.
#pragma once

#include <c10/core/ScalarType.h>

#include "operators/cpu/isa.h"

namespace oryx::operators {

// x is [batch, time, heads, dim] with contiguous last dimension, y contiguous. Row b · time + t reads table
// row (b · time + t) % table_rows.
struct RotaryArguments {
  at::ScalarType dtype;
  int64_t batch, time, heads, dim, table_rows;
  const void* x;
  int64_t batch_stride, time_stride, head_stride;
  const void *cosine, *sine;  // [table_rows, dim / 2], accumulate type
  bool backwards;             // rotate by the negative angle
  void* y;
};

}  // namespace oryx::operators

ORYX_CPU_KERNEL(void, rotate, (const operators::RotaryArguments& arguments), (arguments))
