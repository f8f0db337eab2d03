// CUDA kernels of adamw.
#pragma once

#include <cstdint>

#include "operators/device/element.h"

namespace oryx::cuda {

// One tensor of a step; a null gradient is zero. All of one launch have one element type, float32 or float64.
struct AdamwTensor {
  void* parameter;
  const void* gradient;
  void *first_moment, *second_moment;
  int64_t count;
  double decay;  // 1 − learning_rate · weight_decay
};

// As many tensors as fit the arguments of a launch (4 KiB): tables need no copy to the device, and a captured
// graph holds its own.
inline constexpr int adamw_batch = 56;

struct AdamwBatch {
  device::Element element;
  int tensors;
  AdamwTensor tensor[adamw_batch];
  int first_block[adamw_batch + 1];                                 // filled by adamw_update
  double beta1, beta2, eps, gradient_scale, step_size, correction;  // AdamwFactors of adamw_cpu.h
  const void* device_scale;  // one more factor of the gradients, on the device; or null
  device::Element device_scale_type;
};

void adamw_update(AdamwBatch& batch, void* stream);

// Elements of a gradient that one block squares and adds.
inline constexpr int norm_chunk = 32768;

inline constexpr int norm_batch = 160;

struct NormTensor {
  const void* gradient;
  int64_t count;
};
struct SquaresBatch {
  device::Element element;
  int tensors;
  NormTensor tensor[norm_batch];
  int first_block[norm_batch + 1];  // filled by sum_squares
  double* partials;                 // one a block
};

inline int64_t norm_blocks_of(int64_t count) { return (count + norm_chunk - 1) / norm_chunk; }

// Writes norm_blocks_of() partial sums of every tensor, one after the other.
void sum_squares(SquaresBatch& batch, void* stream);

// *norm = √(Σ partials), in order.
struct SquareRoot {
  const double* partials;
  int64_t count;
  double* norm;
};
void root_of_sum(const SquareRoot& arguments, void* stream);

}  // namespace oryx::cuda
