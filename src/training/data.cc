#include "training/data.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "base/error.h"
#include "base/random.h"
#include "training/event_file.h"

namespace oryx::training {

namespace fs = std::filesystem;

namespace {
constexpr size_t kBatchesAhead = 2;
constexpr int64_t kIdentitySequences = 256;
}  // namespace

SequenceSource::SequenceSource(const std::vector<std::string>& directories, int64_t length,
                               int64_t model_vocabulary, std::string_view key)
    : shards_(directories), directories_(directories.begin(), directories.end()), length_(length) {
  expect(shards_.size() > length,
         "{} holds {} tokens: expected at least {}, one sequence of {} and its last target", key,
         shards_.size(), length + 1, length);
  expect(shards_.vocabulary() <= model_vocabulary,
         "{} was made with a vocabulary of {}: expected at most model.vocabulary = {}", key,
         shards_.vocabulary(), model_vocabulary);
}

at::Tensor SequenceSource::read(const std::vector<int64_t>& indices) const {
  at::Tensor tokens = at::empty({static_cast<int64_t>(indices.size()), length_ + 1}, at::kLong);
  int64_t* out = tokens.mutable_data_ptr<int64_t>();
  for (const int64_t index : indices) {
    shards_.copy(index * length_, length_ + 1, out);
    out += length_ + 1;
  }
  return tokens;
}

fs::path SequenceSource::tokenizer_file() const {
  if (tokenizer() == "bytes") return {};
  for (const fs::path& path : directories_) {
    const fs::path file = (fs::is_directory(path) ? path : path.parent_path()) / "tokenizer.json";
    if (fs::exists(file)) return file;
  }
  fail("{}: expected tokenizer.json beside the shards, which tokenizer {} made",
       directories_.front().string(), tokenizer());
}

DataIdentity SequenceSource::identity() const {
  const int64_t sequences = std::min(count(), kIdentitySequences);
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < sequences; ++i) indices.push_back(i * count() / sequences);
  const at::Tensor sample = read(indices);
  return {tokens(), crc32c({static_cast<const char*>(sample.const_data_ptr()), sample.nbytes()})};
}

int64_t sequence_at(int64_t position, int64_t count, bool shuffled, uint64_t seed) {
  const int64_t pass = position / count, index = position % count;
  if (!shuffled) return index;
  return static_cast<int64_t>(permutation_at(seed, static_cast<uint64_t>(pass), static_cast<uint64_t>(index),
                                             static_cast<uint64_t>(count)));
}

BatchLoader::BatchLoader(const SequenceSource& source, int64_t batch_sequences, Share share, bool shuffled,
                         uint64_t seed, int64_t first_batch, int64_t last_batch)
    : source_(source),
      batch_sequences_(batch_sequences),
      share_(share),
      shuffled_(shuffled),
      seed_(seed),
      thread_([this, first_batch, last_batch] { read_ahead(first_batch, last_batch); }) {}

BatchLoader::~BatchLoader() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

at::Tensor BatchLoader::next() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !ready_.empty() || failure_ != nullptr; });
  // A failure comes after the batches read before it.
  if (ready_.empty()) std::rethrow_exception(failure_);
  at::Tensor batch = std::move(ready_.front());
  ready_.pop_front();
  lock.unlock();
  changed_.notify_all();
  return batch;
}

void BatchLoader::read_ahead(int64_t first_batch, int64_t last_batch) {
  try {
    std::vector<int64_t> indices(static_cast<size_t>(share_.size()));
    for (int64_t batch = first_batch; batch < last_batch; ++batch) {
      for (int64_t i = 0; i < share_.size(); ++i) {
        const int64_t position = batch * batch_sequences_ + share_.begin + i;
        indices[i] = sequence_at(position, source_.count(), shuffled_, seed_);
      }
      at::Tensor tokens = source_.read(indices);
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || ready_.size() < kBatchesAhead; });
      if (stopping_) return;
      ready_.push_back(std::move(tokens));
      changed_.notify_all();
    }
    fail("expected no more than {} batches", last_batch);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    failure_ = std::current_exception();
    changed_.notify_all();
  }
}

}  // namespace oryx::training
