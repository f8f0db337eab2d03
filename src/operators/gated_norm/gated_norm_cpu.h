// CPU kernels of gated_norm on raw pointers.
#pragma once

#include <c10/core/ScalarType.h>

#include "operators/cpu/isa.h"

namespace oryx::operators {

enum class NormMode { norm, gate_norm, norm_gate, product };

// x, gate and update are rows of `channels` contiguous elements of `dtype`, `*_stride` elements apart; every
// other tensor is contiguous. weight, rstd and partials are of the accumulate type.
struct NormInput {
  at::ScalarType dtype;
  NormMode mode;
  int64_t rows, channels, group;
  double eps;
  const void* x;
  int64_t x_stride;
  const void* gate;  // absent in mode norm
  int64_t gate_stride;
  const void* weight;  // [group]; absent in mode product
};

struct NormForward : NormInput {
  const void* update;  // mode norm only: the input is x + update, which is also written to `sum`
  int64_t update_stride;
  void* sum;   // [rows, channels]
  void* y;     // [rows, channels]
  void* rstd;  // [rows, channels / group], absent when no gradient is needed
};

struct NormBackward : NormInput {
  const void* rstd;
  const void* dy;    // [rows, channels]
  const void* dsum;  // mode norm only: a gradient added to dx
  void* dx;
  void* dgate;
  void* dweight;           // [group]
  void* partials;          // [blocks, group]
  int64_t rows_per_block;  // blocks = ceil(rows / rows_per_block)
};

}  // namespace oryx::operators

ORYX_CPU_KERNEL(void, gated_norm_forward, (const operators::NormForward& arguments), (arguments))
ORYX_CPU_KERNEL(void, gated_norm_backward, (const operators::NormBackward& arguments), (arguments))
