// Training sequences from token shards, in an order that is a pure function of seed and position.
#pragma once

#include <ATen/core/Tensor.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <filesystem>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "formats/token_shards.h"
#include "training/buckets.h"
#include "training/checkpoint.h"

namespace oryx::training {

// The tokens of shard directories, one after the other, cut into sequences: number i covers tokens
// i·length … i·length + length, of which the first `length` are inputs and the last `length` targets. A tail
// too short for another sequence is not used.
class SequenceSource {
 public:
  // `key` ("data.train") begins error messages. Throws Error for what TokenShards refuses, for fewer tokens
  // than one sequence takes, and for shards whose vocabulary is larger than the model's.
  SequenceSource(const std::vector<std::string>& directories, int64_t length, int64_t model_vocabulary,
                 std::string_view key);

  int64_t count() const { return (shards_.size() - 1) / length_; }
  int64_t length() const { return length_; }
  int64_t tokens() const { return shards_.size(); }

  // Sequences `indices`, each in 0 … count − 1: int64 [n, length + 1] on the CPU. Throws Error, naming the
  // file and the position, for an id that is not below the vocabulary of the shards.
  at::Tensor read(const std::vector<int64_t>& indices) const;

  // "bytes", or the checksum of the tokenizer file that made the shards.
  const std::string& tokenizer() const { return shards_.tokenizer(); }
  // tokenizer.json beside the shards; empty for "bytes". Throws Error when it is missing.
  std::filesystem::path tokenizer_file() const;

  DataIdentity identity() const;

 private:
  formats::TokenShards shards_;
  std::vector<std::filesystem::path> directories_;
  int64_t length_;
};

// Which sequence stands at `position` ≥ 0 of the data order. "sequential": position mod count. "shuffled":
// every pass over the data is a permutation of its own, named by the seed and the number of the pass.
int64_t sequence_at(int64_t position, int64_t count, bool shuffled, uint64_t seed);

// Reads batches ahead on a thread of its own. Batch b holds the sequences at positions
// b·batch_sequences … (b + 1)·batch_sequences − 1; of these the loader reads those of its share.
class BatchLoader {
 public:
  BatchLoader(const SequenceSource& source, int64_t batch_sequences, Share share, bool shuffled,
              uint64_t seed, int64_t first_batch, int64_t last_batch);
  ~BatchLoader();
  BatchLoader(const BatchLoader&) = delete;
  BatchLoader& operator=(const BatchLoader&) = delete;

  // The share of the next batch, int64 [share.size(), length + 1]; first_batch, then on to last_batch − 1.
  // Throws what reading it threw.
  at::Tensor next();

 private:
  void read_ahead(int64_t first_batch, int64_t last_batch);

  const SequenceSource& source_;
  const int64_t batch_sequences_;
  const Share share_;
  const bool shuffled_;
  const uint64_t seed_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<at::Tensor> ready_;
  std::exception_ptr failure_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace oryx::training
