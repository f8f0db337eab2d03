// CUDA kernels of gated_norm and add_norm.
#pragma once

#include <cstdint>

#include "operators/device/element.h"

namespace oryx::cuda {

enum class Norm : int { norm, add, gate_norm, norm_gate, product };

// x, gate and update are rows of `channels` contiguous elements, `*_stride` elements apart; every other
// tensor is contiguous. weight, partials and dweight are of the accumulate type. `aligned`: 16-byte
// accesses reach every row, every group of `group` channels and the weight.
struct NormTensors {
  device::Element element;
  Norm mode;
  bool aligned;
  int64_t rows, channels, group;
  double eps;
  const void *x, *gate, *update;
  int64_t x_stride, gate_stride, update_stride;
  const void* weight;  // [group]

  void *sum, *y;  // forward; y also in backward, which makes it again where it is not null

  const void *dy, *dsum;  // backward
  void *dx, *dgate;
  void* partials;  // [norm_backward_blocks(…), group]
  void* dweight;   // [group]
};

// Blocks of norm_backward: as many as fit on the device at once, so that each leaves one row of partial sums.
int64_t norm_backward_blocks(const NormTensors& tensors, int multiprocessors);

void norm_forward(const NormTensors& tensors, int multiprocessors, void* stream);
void norm_backward(const NormTensors& tensors, int multiprocessors, void* stream);

// Mode product.
void product_forward(const NormTensors& tensors, void* stream);
void product_backward(const NormTensors& tensors, void* stream);

}  // namespace oryx::cuda
