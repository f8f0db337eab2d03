#include "training/buckets.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <optional>

namespace oryx::training {

namespace {

constexpr int64_t kAlignment = 64;  // elements

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// The parts behind one another, each at its offset, zeros between and behind them.
at::Tensor join(const std::vector<int64_t>& offsets, const std::vector<int64_t>& sizes,
                const std::vector<at::Tensor>& tensors, int64_t size, const at::TensorOptions& options) {
  std::vector<at::Tensor> parts;
  int64_t end = 0;
  const auto pad = [&](int64_t up_to) {
    if (up_to > end) parts.push_back(at::zeros({up_to - end}, options));
    end = up_to;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].defined()) continue;
    pad(offsets[i]);
    parts.push_back(tensors[i].reshape({-1}));
    end += sizes[i];
  }
  pad(size);
  return at::cat(parts);
}

}  // namespace

std::vector<Bucket> make_buckets(const std::vector<model::ParameterSpec>& specs, int64_t limit,
                                 int64_t ranks) {
  std::vector<Bucket> buckets;
  std::array<std::optional<size_t>, 2> open;  // the bucket being filled: of matrices, of the others
  for (size_t parameter = specs.size(); parameter-- > 0;) {
    const int64_t size = specs[parameter].size(), aligned = round_up(size, kAlignment);
    std::optional<size_t>& own = open[specs[parameter].is_matrix ? 0 : 1];
    if (!own || buckets[*own].size + aligned > limit) {
      own = buckets.size();
      buckets.emplace_back();
    }
    Bucket& bucket = buckets[*own];
    bucket.entries.push_back({parameter, bucket.size, size});
    bucket.size += aligned;
  }
  std::sort(buckets.begin(), buckets.end(), [](const Bucket& a, const Bucket& b) {
    return a.entries.back().parameter > b.entries.back().parameter;
  });
  for (Bucket& bucket : buckets) bucket.size = round_up(bucket.size, kAlignment * ranks);
  return buckets;
}

std::vector<Piece> pieces_of(const Bucket& bucket, int64_t rank, int64_t ranks) {
  const int64_t begin = bucket.size / ranks * rank, end = begin + bucket.size / ranks;
  std::vector<Piece> pieces;
  for (const BucketEntry& entry : bucket.entries) {
    const int64_t first = std::max(begin, entry.offset), last = std::min(end, entry.offset + entry.size);
    if (first < last) pieces.push_back({entry.parameter, first - entry.offset, last - first, first - begin});
  }
  return pieces;
}

std::vector<Piece> pieces_of(const std::vector<Bucket>& buckets, int64_t rank, int64_t ranks) {
  std::vector<Piece> pieces;
  for (const Bucket& bucket : buckets) {
    for (const Piece& piece : pieces_of(bucket, rank, ranks)) pieces.push_back(piece);
  }
  return pieces;
}

at::Tensor flatten(const Bucket& bucket, const std::vector<at::Tensor>& tensors,
                   const at::TensorOptions& options) {
  std::vector<int64_t> offsets, sizes;
  for (const BucketEntry& entry : bucket.entries) {
    offsets.push_back(entry.offset);
    sizes.push_back(entry.size);
  }
  return join(offsets, sizes, tensors, bucket.size, options);
}

at::Tensor flatten_share(const std::vector<Piece>& pieces, const std::vector<at::Tensor>& tensors,
                         int64_t size, const at::TensorOptions& options) {
  std::vector<int64_t> offsets, sizes;
  for (const Piece& piece : pieces) {
    offsets.push_back(piece.offset);
    sizes.push_back(piece.size);
  }
  return join(offsets, sizes, tensors, size, options);
}

Share share_of(int64_t count, int64_t rank, int64_t ranks) {
  return {count * rank / ranks, count * (rank + 1) / ranks};
}

}  // namespace oryx::training
