// CPU kernels of short_conv on raw pointers.
#pragma once

#include <c10/core/ScalarType.h>

#include "operators/cpu/isa.h"

namespace oryx::operators {

// Tokens of one block: it starts from the inputs just before it, so blocks are independent, and each owns one
// row of partial sums for the gradients of weight and bias.
inline constexpr int64_t short_conv_block = 256;

// Rows of x are contiguous along the channels; everything else is contiguous. weight and bias and their
// gradients are of the accumulate type.
struct ShortConvInput {
  at::ScalarType dtype;
  bool silu;
  int64_t batch, time, channels, width;
  const void* x;
  int64_t x_batch_stride, x_time_stride;
  const int64_t*
      x_rows;  // [batch, time] (kernels of a GPU): x's row of each token, in place of a batch; or null
  const void* weight;  // [channels, width]
  const void* bias;    // [channels] or null
  const void* tail;    // [batch, width - 1, channels] or null
};

struct ShortConvForward : ShortConvInput {
  void* y;         // [batch, time, channels]
  void* new_tail;  // [batch, width - 1, channels]
};

struct ShortConvBackward : ShortConvInput {
  const void* dy;         // [batch, time, channels]
  const void* dy_again;   // the same, to be added to it (kernels of a GPU), or null
  const void* dnew_tail;  // [batch, width - 1, channels] or null
  void* dx;               // [batch, time, channels], its rows in the order of x
  void* dtail;            // [batch, width - 1, channels] or null
  void* partials;         // [batch · ceil(time / block), width + 1, channels]
  void* sums;             // [width + 1, channels]: weight by tap, then bias
};

}  // namespace oryx::operators

ORYX_CPU_KERNEL(void, short_conv_forward, (const operators::ShortConvForward& arguments), (arguments))
ORYX_CPU_KERNEL(void, short_conv_backward, (const operators::ShortConvBackward& arguments), (arguments))
