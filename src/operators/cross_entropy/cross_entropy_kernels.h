// CUDA kernels of cross_entropy.
#pragma once

#include <cstdint>

#include "operators/device/element.h"

namespace oryx::cuda {

// SoftmaxLoss of cross_entropy_cpu.h: the losses of the rows of logits [rows, columns], contiguous, and with
// `gradient` their gradients in place. A target of `columns` or more gives NaN in the loss and in the whole
// row.
struct RowLosses {
  device::Element element;
  bool gradient;
  int64_t rows, columns;
  void* logits;
  const int64_t* targets;
  void* losses;  // [rows], accumulate type
  double scale;
};
void row_losses(const RowLosses& arguments, void* stream);

// values[i] *= *factor, or nothing at all where the factor is exactly one.
struct Scaling {
  device::Element element;
  void* values;
  int64_t count;
  const void* factor;  // accumulate type of the element
};
void scale_in_place(const Scaling& arguments, int multiprocessors, void* stream);

}  // namespace oryx::cuda
