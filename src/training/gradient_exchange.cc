#include "training/gradient_exchange.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "base/error.h"
#include "operators/activations.h"

namespace oryx::training {

// Called by autograd when the gradient of a parameter is complete for this pass.
struct GradientExchange::Hook : torch::autograd::PostAccumulateGradHook {
  Hook(GradientExchange* its_exchange, size_t its_parameter)
      : exchange(its_exchange), parameter(its_parameter) {}
  void operator()(const at::Tensor&) override { exchange->arrived(parameter); }

  GradientExchange* exchange;
  size_t parameter;
};

GradientExchange::GradientExchange(std::vector<at::Tensor> parameters, std::vector<Bucket> buckets,
                                   ProcessGroup& group, bool shard)
    : parameters_(std::move(parameters)),
      group_(group),
      shard_(shard),
      buckets_(std::move(buckets)),
      bucket_of_(parameters_.size()) {
  const at::ScalarType type = operators::gradient_type(parameters_[0]);
  for (const at::Tensor& parameter : parameters_) {
    expect(operators::gradient_type(parameter) == type, "expected parameters with gradients of one type");
  }
  options_ = parameters_[0].detach().options().dtype(type);
  for (size_t b = 0; b < buckets_.size(); ++b) {
    for (const BucketEntry& entry : buckets_[b].entries) bucket_of_[entry.parameter] = b;
  }
  if (shard_) pieces_ = pieces_of(buckets_, group.rank(), group.size());
  for (size_t i = 0; i < parameters_.size(); ++i) {
    torch::autograd::impl::set_post_acc_grad_hooks(parameters_[i], std::make_unique<Hook>(this, i));
  }
  under_way_.resize(buckets_.size());
  sums_.resize(buckets_.size());
}

GradientExchange::~GradientExchange() {
  for (const at::Tensor& parameter : parameters_) {
    torch::autograd::impl::set_post_acc_grad_hooks(parameter, nullptr);
  }
}

void GradientExchange::expect_last_pass() {
  missing_.clear();
  for (const Bucket& bucket : buckets_) missing_.push_back(bucket.entries.size());
  sent_ = 0;
  last_pass_ = true;
}

void GradientExchange::arrived(size_t parameter) {
  if (!last_pass_) return;
  const size_t bucket = bucket_of_[parameter];
  expect(missing_[bucket] > 0, "a gradient came in two parts within one backward pass");
  --missing_[bucket];
  while (sent_ < buckets_.size() && missing_[sent_] == 0) send(sent_++);
}

void GradientExchange::send(size_t b) {
  const at::NoGradGuard no_grad;
  const Bucket& bucket = buckets_[b];
  std::vector<at::Tensor> gradients;
  for (const BucketEntry& entry : bucket.entries) gradients.push_back(parameters_[entry.parameter].grad());
  const at::Tensor flat = flatten(bucket, gradients, options_);
  if (shard_) {
    for (const BucketEntry& entry : bucket.entries) parameters_[entry.parameter].mutable_grad().reset();
    sums_[b] = at::empty({bucket.size / group_.size()}, flat.options());
    under_way_[b] = group_.reduce_scatter(flat, sums_[b]);
    return;
  }
  for (const BucketEntry& entry : bucket.entries) {
    const at::Tensor& parameter = parameters_[entry.parameter];
    parameter.mutable_grad() = flat.narrow(0, entry.offset, entry.size).view(parameter.sizes());
  }
  sums_[b] = flat;
  under_way_[b] = group_.all_reduce(flat);
}

void GradientExchange::finish() {
  last_pass_ = false;
  sent_early_ = sent_;
  while (sent_ < buckets_.size()) send(sent_++);
  for (Exchange& exchange : under_way_) exchange.wait();
}

std::vector<at::Tensor> GradientExchange::gradients() const {
  std::vector<at::Tensor> gradients;
  if (!shard_) {
    for (const at::Tensor& parameter : parameters_) gradients.push_back(parameter.grad());
    return gradients;
  }
  for (size_t b = 0; b < buckets_.size(); ++b) {
    for (const Piece& piece : pieces_of(buckets_[b], group_.rank(), group_.size())) {
      gradients.push_back(sums_[b].narrow(0, piece.offset, piece.size));
    }
  }
  return gradients;
}

void GradientExchange::clear() {
  for (at::Tensor& parameter : parameters_) parameter.mutable_grad().reset();
  std::fill(sums_.begin(), sums_.end(), at::Tensor());
}

}  // namespace oryx::training
