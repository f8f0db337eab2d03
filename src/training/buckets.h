// Parameters laid one after the other in flat buffers, in which ranks exchange them, and the parts of those
// that a rank owns.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "model/weights.h"

namespace oryx::training {

struct BucketEntry {
  size_t parameter = 0;  // its number in the order of the weights
  int64_t offset = 0;    // of its first element in the bucket
  int64_t size = 0;      // elements
};

struct Bucket {
  std::vector<BucketEntry> entries;
  int64_t size = 0;  // elements, padding included: a multiple of the number of ranks
};

// Elements of a bucket whose gradients are of `dtype`: 25 MiB.
inline int64_t bucket_limit(at::ScalarType dtype) {
  return (int64_t{25} << 20) / static_cast<int64_t>(c10::elementSize(dtype));
}

// Buckets of about `limit` elements, filled from the last parameter to the first: the order in which a
// backward pass comes to them and completes the buckets. A bucket holds matrices alone or none, as ranks may
// keep these in another type than the rest. A parameter is never split. Offsets, and the shares of the ranks,
// are multiples of 64 elements, so that kernels find them aligned.
std::vector<Bucket> make_buckets(const std::vector<model::ParameterSpec>& specs, int64_t limit,
                                 int64_t ranks);

// Consecutive elements of one parameter.
struct Piece {
  size_t parameter = 0;
  int64_t begin = 0;  // in the parameter, row by row
  int64_t size = 0;
  int64_t offset = 0;  // of its first element in its owner's share of the bucket
};

// What of a bucket belongs to `rank`: share number `rank` of `ranks` equal ones.
std::vector<Piece> pieces_of(const Bucket& bucket, int64_t rank, int64_t ranks);
// The same of all buckets, one after the other.
std::vector<Piece> pieces_of(const std::vector<Bucket>& buckets, int64_t rank, int64_t ranks);

// `tensors[i]` for every entry (undefined: zeros) in one flat tensor of the bucket's size.
at::Tensor flatten(const Bucket& bucket, const std::vector<at::Tensor>& tensors,
                   const at::TensorOptions& options);

// The same for the pieces of one share, `tensors[i]` being that of piece i.
at::Tensor flatten_share(const std::vector<Piece>& pieces, const std::vector<at::Tensor>& tensors,
                         int64_t size, const at::TensorOptions& options);

// Which of `count` consecutive things fall to `rank`: [begin, end), all ranks together each one once.
struct Share {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};
Share share_of(int64_t count, int64_t rank, int64_t ranks);

}  // namespace oryx::training
