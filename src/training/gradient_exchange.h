// The gradients of a step, summed over the ranks while the backward pass that makes them still goes on.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "training/buckets.h"
#include "training/process_group.h"

namespace oryx::training {

class GradientExchange {
 public:
  // Leaves that collect gradients of one type, and the buckets they go in. With `shard`, a rank gets the sums
  // of its own pieces only.
  GradientExchange(std::vector<at::Tensor> parameters, std::vector<Bucket> buckets, ProcessGroup& group,
                   bool shard);
  ~GradientExchange();
  GradientExchange(const GradientExchange&) = delete;
  GradientExchange& operator=(const GradientExchange&) = delete;

  // The next backward pass is the last of this step: a bucket is sent as soon as its gradients are complete,
  // in the order of the buckets on every rank.
  void expect_last_pass();

  // After that pass: sends what is left (a parameter that no token of this rank used has gradient zero) and
  // waits. Then gradients() are the sums, and without `shard` they are the parameters' own gradients too.
  void finish();

  // Of the parameters in their order; with `shard` of pieces().
  std::vector<at::Tensor> gradients() const;

  // Lets go of the gradients, the parameters' own included.
  void clear();

  // Of the buckets, how many left before the last backward pass ended.
  size_t sent_early() const { return sent_early_; }

  const std::vector<Bucket>& buckets() const { return buckets_; }
  // What this rank owns with `shard`, bucket by bucket.
  const std::vector<Piece>& pieces() const { return pieces_; }

 private:
  struct Hook;

  void arrived(size_t parameter);
  void send(size_t bucket);

  std::vector<at::Tensor> parameters_;
  ProcessGroup& group_;
  const bool shard_;
  const std::vector<Bucket> buckets_;
  at::TensorOptions options_;  // of gradients
  std::vector<Piece> pieces_;
  std::vector<size_t> bucket_of_;  // by parameter

  bool last_pass_ = false;
  std::vector<size_t> missing_;  // gradients of each bucket that are not complete yet
  size_t sent_ = 0;              // buckets, from the first on
  size_t sent_early_ = 0;
  std::vector<Exchange> under_way_;
  std::vector<at::Tensor> sums_;  // of each bucket; with `shard` this rank's share of it
};

}  // namespace oryx::training
