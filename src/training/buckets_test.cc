#include "training/buckets.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>

#include "model/language_model.h"
#include "training/memory.h"
#include "training/optimizer.h"
#include "training/sharding.h"

namespace oryx::training {
namespace {

// Vectors and matrices (of one row) of some sizes.
std::vector<model::ParameterSpec> parameters(size_t count) {
  std::vector<model::ParameterSpec> specs(count);
  for (model::ParameterSpec& spec : specs) {
    spec.is_matrix = *rc::gen::arbitrary<bool>();
    spec.shape = {*rc::gen::inRange<int64_t>(1, 3000)};
  }
  return specs;
}

TEST(Buckets, HoldEveryParameterOnceInReverse) {
  EXPECT_TRUE(rc::check([] {
    const std::vector<model::ParameterSpec> specs = parameters(*rc::gen::inRange<size_t>(1, 20));
    const auto ranks = *rc::gen::inRange<int64_t>(1, 9), limit = *rc::gen::inRange<int64_t>(1, 5000);
    std::vector<size_t> count(specs.size());
    size_t completed = specs.size();
    for (const Bucket& bucket : make_buckets(specs, limit, ranks)) {
      int64_t end = 0;
      size_t before = specs.size();
      for (const BucketEntry& entry : bucket.entries) {
        RC_ASSERT(entry.parameter < before);
        RC_ASSERT(entry.size == specs[entry.parameter].size());
        RC_ASSERT(specs[entry.parameter].is_matrix == specs[bucket.entries[0].parameter].is_matrix);
        RC_ASSERT(entry.offset >= end && entry.offset % 64 == 0);
        end = entry.offset + entry.size;
        before = entry.parameter;
        ++count[entry.parameter];
      }
      RC_ASSERT(before < completed);  // a backward pass completes the buckets in their order
      completed = before;
      RC_ASSERT(bucket.size >= end && bucket.size % (64 * ranks) == 0);
      RC_ASSERT(bucket.entries.size() == 1 || bucket.entries.back().offset < limit);
    }
    RC_ASSERT(count == std::vector<size_t>(specs.size(), 1));
  }));
}

TEST(Buckets, ThePiecesOfAllRanksAreThePartsOfTheWhole) {
  EXPECT_TRUE(rc::check([] {
    const std::vector<model::ParameterSpec> specs = parameters(*rc::gen::inRange<size_t>(1, 12));
    const auto ranks = *rc::gen::inRange<int64_t>(1, 9);
    std::vector<at::Tensor> tensors;
    for (const model::ParameterSpec& spec : specs) tensors.push_back(at::rand({spec.size()}));
    for (const Bucket& bucket : make_buckets(specs, 4000, ranks)) {
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
  }));
}

TEST(Buckets, AMissingTensorIsZeros) {
  std::vector<model::ParameterSpec> specs(2);
  specs[0].shape = {3};
  specs[1].shape = {70};
  const Bucket bucket = make_buckets(specs, 1000, 2).front();
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

int64_t bytes(const std::vector<at::Tensor>& tensors) {
  int64_t sum = 0;
  for (const at::Tensor& tensor : tensors) sum += static_cast<int64_t>(tensor.nbytes());
  return sum;
}

// What one rank makes for training, and the gradients of a step.
RankMemory measured(at::ScalarType dtype, int64_t ranks, bool shard, int64_t rank) {
  const model::ModelConfig config = small_model();
  const std::vector<model::ParameterSpec> specs = model::parameter_specs(config);
  const at::ScalarType master = dtype == at::kDouble ? at::kDouble : at::kFloat;
  model::Weights weights = model::initial_weights(config, 0, master);
  const std::vector<Piece> pieces = pieces_of(make_buckets(specs, bucket_limit(master), ranks), rank, ranks);
  const Optimizer optimizer =
      shard ? Optimizer(weights, {}, pieces, take_masters(weights, specs, dtype, pieces))
            : Optimizer(weights, {});
  std::vector<at::Tensor> whole, gradients, masters;
  for (const auto& [name, tensor] : weights.entries()) whole.push_back(tensor);
  for (const at::Tensor& tensor : optimizer.parameters()) {
    const bool is_view = std::any_of(whole.begin(), whole.end(),
                                     [&](const at::Tensor& its) { return its.is_alias_of(tensor); });
    if (!is_view) masters.push_back(tensor);
  }
  model::LanguageModel model(config, weights, dtype);
  const at::Tensor tokens = at::randint(config.vocabulary, {1, 64}, at::kLong);
  const schedule::ModeSpans spans = {{0, 32, schedule::Mode::attention}, {32, 64, schedule::Mode::linear}};
  model.loss(model.hidden(tokens, {spans}), tokens.view({-1}), 1).first.backward();
  for (const at::Tensor& tensor : whole) gradients.push_back(tensor.grad());
  return {bytes(whole), bytes(masters), bytes(gradients),
          bytes(optimizer.first_moments()) + bytes(optimizer.second_moments())};
}

// What rank_memory() promises, and inspect prints, beside the tensors that are really made.
TEST(RankMemory, IsWhatIsAllocated) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    for (const int64_t ranks : {1, 2, 3, 8}) {
      for (const bool shard : {false, true}) {
        const RankMemory memory = rank_memory(small_model(), dtype, ranks, shard);
        int64_t moments = 0, masters = 0;
        for (int64_t rank = 0; rank < (shard ? ranks : 1); ++rank) {
          const RankMemory its = measured(dtype, ranks, shard, rank);
          EXPECT_EQ(memory.weights, its.weights);
          EXPECT_EQ(memory.gradients, its.gradients);
          moments = std::max(moments, its.moments);
          masters = std::max(masters, its.masters);
        }
        EXPECT_EQ(memory.moments, moments);
        EXPECT_EQ(memory.masters, masters);
        // The parts are equal but for padding.
        EXPECT_LE(moments, 2 * memory.gradients / (shard ? ranks : 1) + (shard ? 2 * 8 * 64 * 64 : 0));
        EXPECT_EQ(masters > 0, shard && dtype == at::kBFloat16);
        EXPECT_EQ(memory.weights<memory.gradients, masters> 0);
        EXPECT_LE(masters, moments / 2);
      }
    }
  }
}

}  // namespace
}  // namespace oryx::training
