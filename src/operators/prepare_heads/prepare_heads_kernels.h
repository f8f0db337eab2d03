// CUDA kernels of prepare_heads, and with fewer steps of l2_norm and rotary.
#pragma once

#include <cstdint>

#include "operators/device/element.h"

namespace oryx::cuda {

// Vectors of `dim` elements: x [batch, time, heads, dim] with contiguous last dimension; y, dy and dx
// contiguous. Row b · time + t reads table row (b · time + t) % table_rows. Fewer than 2³¹ vectors.
struct HeadTensors {
  device::Element element;
  bool silu, l2, rotate;  // the steps, in this order
  bool backwards;         // forward only: rotates by the negative angle
  bool aligned;           // 16-byte accesses reach every half of a vector
  int64_t batch, time, heads, dim;
  // Backward: absent where it only rotates; where it only normalises, y stands here.
  const void* x;
  const void* again;  // forward that only rotates: rotated is x + again, of the same strides; or null
  int64_t batch_stride, time_stride, head_stride;
  double eps;
  const void *cosine, *sine;  // [table_rows, dim / 2], accumulate type
  int64_t table_rows;
  void* scale;  // [batch, time, heads]: 1 / sqrt(Σ u² + eps), accumulate type; null: not kept
  void* y;
  const void* dy;
  void* dx;
};

void prepare_heads_forward(const HeadTensors& tensors, void* stream);
void prepare_heads_backward(const HeadTensors& tensors, void* stream);

}  // namespace oryx::cuda
