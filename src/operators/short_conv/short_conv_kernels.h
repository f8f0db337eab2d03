// CUDA kernels of short_conv.
#pragma once

#include <cstdint>

#include "operators/device/element.h"

namespace oryx::cuda {

// Tokens whose shares of the parameters' gradients make one row of partial sums.
inline constexpr int conv_block = 256;

// Rows of x are contiguous along the channels; everything else is contiguous. weight, bias and their
// gradients are of the accumulate type. `aligned`: four elements at a time reach every row of x and of the
// tensors of its shape, and 16 bytes the weight. Where x_rows is there, x has no batches, and x_time_stride
// parts its rows.
struct ConvTensors {
  device::Element element;
  bool silu, aligned;
  int64_t batch, time, channels, width;
  const void* x;
  int64_t x_batch_stride, x_time_stride;
  const int64_t* x_rows;  // [batch, time]: the row of x and dx of each token; or null
  const void* weight;     // [channels, width]
  const void* bias;       // [channels] or null
  const void* tail;       // [batch, width - 1, channels] or null

  void *y, *new_tail;  // forward: [batch, time, channels], [batch, width - 1, channels]

  const void* dy;         // backward
  const void* dy_again;   // added to dy; or null
  const void* dnew_tail;  // or null
  void* dx;
  void* dtail;     // or null
  void* partials;  // [batch · ceil(time / conv_block), channels · (width + 1)]
  void* sums;      // [channels · (width + 1)]: the weight [channels, width], then the bias
};

void conv_forward(const ConvTensors& tensors, void* stream);
// time > 0.
void conv_backward(const ConvTensors& tensors, void* stream);

}  // namespace oryx::cuda
