#include "training/buckets.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <numeric>

#include "training/memory.h"
#include "training/optimizer.h"

namespace oryx::training {
namespace {

TEST(Buckets, HoldEveryParameterOnceInReverse) {
  rc::check([] {
    const auto count = *rc::gen::inRange<size_t>(1, 20);
    const auto sizes = *rc::gen::container<std::vector<int64_t>>(count, rc::gen::inRange<int64_t>(1, 3000));
    const auto ranks = *rc::gen::inRange<int64_t>(1, 9), limit = *rc::gen::inRange<int64_t>(1, 5000);
    size_t next = sizes.size();
    for (const Bucket& bucket : make_buckets(sizes, limit, ranks)) {
      int64_t end = 0;
      for (const BucketEntry& entry : bucket.entries) {
        RC_ASSERT(entry.parameter == --next);
        RC_ASSERT(entry.size == sizes[next]);
        RC_ASSERT(entry.offset >= end && entry.offset % 64 == 0);
        end = entry.offset + entry.size;
      }
      RC_ASSERT(bucket.size >= end && bucket.size % (64 * ranks) == 0);
      RC_ASSERT(bucket.entries.size() == 1 || bucket.entries.back().offset < limit);
    }
    RC_ASSERT(next == 0u);
  });
}

TEST(Buckets, ThePiecesOfAllRanksAreThePartsOfTheWhole) {
  rc::check([] {
    const auto count = *rc::gen::inRange<size_t>(1, 12);
    const auto sizes = *rc::gen::container<std::vector<int64_t>>(count, rc::gen::inRange<int64_t>(1, 3000));
    const auto ranks = *rc::gen::inRange<int64_t>(1, 9);
    std::vector<at::Tensor> tensors;
    for (const int64_t size : sizes) tensors.push_back(at::rand({size}));
    for (const Bucket& bucket : make_buckets(sizes, 4000, ranks)) {
      std::vector<at::Tensor> entries, shares;
      for (const BucketEntry& entry : bucket.entries) entries.push_back(tensors[entry.parameter]);
      const at::Tensor whole = flatten(bucket, entries, at::kFloat);
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const std::vector<Piece> pieces = pieces_of(bucket, rank, ranks);
        std::vector<at::Tensor> parts;
        for (const Piece& piece : pieces) {
          parts.push_back(tensors[piece.parameter].narrow(0, piece.begin, piece.size));
        }
        shares.push_back(flatten_share(pieces, parts, bucket.size / ranks, at::kFloat));
      }
      RC_ASSERT(at::cat(shares).equal(whole));
    }
  });
}

TEST(Buckets, AMissingTensorIsZeros) {
  const Bucket bucket = make_buckets({3, 70}, 1000, 2).front();
  const at::Tensor flat = flatten(bucket, {at::Tensor(), at::ones({3})}, at::kFloat);
  EXPECT_EQ(flat.numel(), 256);  // 128 + 64, for two ranks
  EXPECT_EQ(flat.sum().item<float>(), 3);
  EXPECT_EQ(flat.narrow(0, 128, 3).sum().item<float>(), 3);
}

TEST(Share, EveryOneOnce) {
  for (int64_t count = 0; count < 20; ++count) {
    for (int64_t ranks = 1; ranks < 8; ++ranks) {
      int64_t next = 0;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const Share share = share_of(count, rank, ranks);
        EXPECT_EQ(share.begin, next);
        EXPECT_LE(share.size(), (count + ranks - 1) / ranks);
        next = share.end;
      }
      EXPECT_EQ(next, count);
    }
  }
}

model::ModelConfig small_model() {
  model::ModelConfig config = model::ModelConfig::with_mixers({"attention", "gated_delta"});
  config.layers = 3;
  config.width = 64;
  config.head_dim = config.value_dim = 32;
  config.heads = config.kv_heads = config.value_heads = 2;
  config.mlp_width = 96;
  config.vocabulary = 257;
  return config;
}

// What rank_memory() promises, and inspect prints, beside the tensors that are really made.
TEST(RankMemory, IsWhatIsAllocated) {
  for (const int64_t ranks : {1, 2, 3, 8}) {
    for (const bool shard : {false, true}) {
      model::Weights weights = model::initial_weights(small_model(), 0, at::kFloat);
      std::vector<int64_t> sizes;
      int64_t weight_bytes = 0, most = 0;
      for (const auto& [name, tensor] : weights.entries()) {
        sizes.push_back(tensor.numel());
        weight_bytes += static_cast<int64_t>(tensor.nbytes());
      }
      for (int64_t rank = 0; rank < ranks; ++rank) {
        std::vector<Piece> pieces;
        for (const Bucket& bucket : make_buckets(sizes, kBucketBytes / 4, ranks)) {
          for (const Piece& piece : pieces_of(bucket, rank, ranks)) pieces.push_back(piece);
        }
        const Optimizer optimizer = shard ? Optimizer(weights, {}, pieces) : Optimizer(weights, {});
        int64_t bytes = 0;
        for (const auto& moment : optimizer.first_moments()) bytes += static_cast<int64_t>(moment.nbytes());
        for (const auto& moment : optimizer.second_moments()) bytes += static_cast<int64_t>(moment.nbytes());
        most = std::max(most, bytes);
      }
      const RankMemory memory = rank_memory(small_model(), at::kFloat, ranks, shard);
      EXPECT_EQ(memory.weights, weight_bytes);
      EXPECT_EQ(memory.gradients, weight_bytes);
      EXPECT_EQ(memory.moments, most);
      EXPECT_LE(memory.moments, 2 * weight_bytes / (shard ? ranks : 1) + (shard ? 2 * 4 * 64 * 64 : 0));
    }
  }
}

}  // namespace
}  // namespace oryx::training
