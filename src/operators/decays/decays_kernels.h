// CUDA kernels of decays.
#pragma once

#include <cstdint>

#include "operators/device/element.h"

namespace oryx::cuda {

// Tokens whose shares of the parameters' gradients make one row of partial sums.
inline constexpr int decay_block = 128;

// x and beta are rows of `heads` contiguous elements, `*_stride` elements apart; every other tensor is
// contiguous. bias, log_a, mask, the results, their gradients and the sums are of the accumulate type.
struct DecayTensors {
  device::Element element;
  int64_t tokens, heads;
  const void *x, *beta;  // beta or null
  int64_t x_stride, beta_stride;
  const int64_t* rows;  // [tokens]: the row of x, beta, dx and dbeta of each token; or null
  const void *bias, *log_a;
  const void* mask;  // [tokens] or null

  void *log_decay, *strength;  // forward: [tokens, heads]

  const void *dlog_decay, *dstrength;  // backward; either may be null
  void *dx, *dbeta;                    // dbeta null as beta
  void* partials;                      // [ceil(tokens / decay_block), 2, heads]
  void* sums;                          // [2, heads]: of bias, then of log_a
};

void decays_forward(const DecayTensors& tensors, void* stream);
void decays_backward(const DecayTensors& tensors, void* stream);

}  // namespace oryx::cuda
