// What a model costs before it runs: parameters, state bytes, floating-point operations (model.md §9).
#pragma once

#include <ATen/core/Tensor.h>

#include "model/config.h"

namespace oryx::model {

struct ParameterCount {
  int64_t total = 0;  // stored
  int64_t embedding = 0;
  int64_t blocks_shared = 0;     // in the layers, read by every mode
  int64_t blocks_attention = 0;  // read by attention alone
  int64_t blocks_linear = 0;     // read by the linear mixer alone
  // What one mode reads; for static hybrids everything.
  int64_t active(schedule::Mode mode) const;
  // Shared weights of the layers as a share of what one mode reads there, and of everything stored there.
  double tied_share_of_mode(schedule::Mode mode) const;
  double tied_share_of_stored() const;
};

ParameterCount count_parameters(const ModelConfig& config);

struct StateBytes {
  int64_t per_token = 0;     // keys and values
  int64_t per_sequence = 0;  // recurrent state and convolution tails
};

StateBytes count_state_bytes(const ModelConfig& config, at::ScalarType dtype);

// Floating-point operations of one forward pass over a sequence of `tokens` tokens.
struct Flops {
  double weights = 0;        // 2 · (tokens that read a matrix) · (its entries); the head for every token
  double state_update = 0;   // 2 T D_k D_v (1 + 1/C) a head, whatever the modes
  double linear_output = 0;  // δ (2 T C (D_k + D_v) + 2 T D_k D_v) a head
  double attention = 0;      // Σ over attention tokens t of 2 (t + 1) (D_k + D_v) a head
  double total() const { return weights + state_update + linear_output + attention; }
};

// C is the chunk length the formula assumes: 128, as model.md §9.
Flops count_flops(const ModelConfig& config, const schedule::ModeSpans& spans, int64_t chunk = 128);

}  // namespace oryx::model
