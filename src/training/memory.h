// What training keeps on every rank, from sizes alone. Activations come on top.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "model/config.h"

namespace oryx::training {

struct RankMemory {
  int64_t weights = 0;    // bytes; whole on every rank
  int64_t gradients = 0;  // at the end of a backward pass
  int64_t moments = 0;    // of the rank that has most
};

RankMemory rank_memory(const model::ModelConfig& config, at::ScalarType weight_dtype, int64_t ranks,
                       bool shard_optimizer);

}  // namespace oryx::training
