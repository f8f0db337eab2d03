#include "training/memory.h"

#include <algorithm>

#include "model/weights.h"
#include "training/buckets.h"

namespace oryx::training {

RankMemory rank_memory(const model::ModelConfig& config, at::ScalarType weight_dtype, int64_t ranks,
                       bool shard_optimizer) {
  const auto element = static_cast<int64_t>(c10::elementSize(weight_dtype));
  std::vector<int64_t> sizes;
  int64_t parameters = 0;
  for (const model::ParameterSpec& spec : model::parameter_specs(config)) {
    sizes.push_back(spec.size());
    parameters += spec.size();
  }
  int64_t owned = parameters;
  if (shard_optimizer) {
    owned = 0;
    const std::vector<Bucket> buckets = make_buckets(sizes, kBucketBytes / element, ranks);
    for (int64_t rank = 0; rank < ranks; ++rank) {
      int64_t its = 0;
      for (const Bucket& bucket : buckets) {
        for (const Piece& piece : pieces_of(bucket, rank, ranks)) its += piece.size;
      }
      owned = std::max(owned, its);
    }
  }
  return {parameters * element, parameters * element, 2 * owned * element};
}

}  // namespace oryx::training
