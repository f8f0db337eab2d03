#include "training/memory.h"

#include <algorithm>

#include "model/weights.h"
#include "operators/activations.h"
#include "training/buckets.h"

namespace oryx::training {

RankMemory rank_memory(const model::ModelConfig& config, at::ScalarType compute_dtype, int64_t ranks,
                       bool shard_optimizer) {
  const at::ScalarType master = operators::accumulate_type(compute_dtype);
  const auto master_size = static_cast<int64_t>(c10::elementSize(master));
  const bool rounds = shard_optimizer && compute_dtype != master;
  const auto matrix_size = rounds ? static_cast<int64_t>(c10::elementSize(compute_dtype)) : master_size;

  const std::vector<model::ParameterSpec> specs = model::parameter_specs(config);
  RankMemory memory;
  for (const model::ParameterSpec& spec : specs) {
    memory.weights += spec.size() * (spec.is_matrix ? matrix_size : master_size);
    memory.gradients += spec.size() * master_size;
  }
  if (!shard_optimizer) {
    memory.moments = 2 * memory.gradients;
    return memory;
  }
  const std::vector<Bucket> buckets = make_buckets(specs, bucket_limit(master), ranks);
  for (int64_t rank = 0; rank < ranks; ++rank) {
    int64_t matrices = 0, all = 0;
    for (const Piece& piece : pieces_of(buckets, rank, ranks)) {
      all += piece.size;
      if (specs[piece.parameter].is_matrix) matrices += piece.size;
    }
    memory.moments = std::max(memory.moments, 2 * all * master_size);
    if (rounds) memory.masters = std::max(memory.masters, matrices * master_size);
  }
  return memory;
}

}  // namespace oryx::training
