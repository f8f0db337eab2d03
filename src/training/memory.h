// What training keeps on every rank, from sizes alone. Activations come on top.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "model/config.h"

namespace oryx::training {

struct RankMemory {
  int64_t weights = 0;    // bytes; whole on every rank, in the types that products read with shard_optimizer
  int64_t masters = 0;    // originals held beside weights that are rounded, of the rank that has most
  int64_t gradients = 0;  // at the end of a backward pass
  int64_t moments = 0;    // of the rank that has most
};

// `compute_dtype` as the recipe has it; weights are updated in its accumulate type.
RankMemory rank_memory(const model::ModelConfig& config, at::ScalarType compute_dtype, int64_t ranks,
                       bool shard_optimizer);

}  // namespace oryx::training
