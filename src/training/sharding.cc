#include "training/sharding.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <array>
#include <functional>

namespace oryx::training {

namespace {

at::TensorOptions options_of(const model::Weights& weights) {
  return weights.entries().front().second.detach().options();
}

// For every bucket the shares of all ranks, put together: `part(i)` is what this rank has of its piece i, and
// `use` gets each whole bucket. While one is used the next one is on its way.
void gather(const std::vector<Bucket>& buckets, const at::TensorOptions& options, ProcessGroup& group,
            bool host_waits, const std::function<at::Tensor(size_t, const Piece&)>& part,
            const std::function<void(const Bucket&, const at::Tensor&)>& use) {
  at::Tensor before;
  Exchange under_way;
  size_t piece = 0;
  for (size_t b = 0; b <= buckets.size(); ++b) {
    at::Tensor whole;
    Exchange next;
    if (b < buckets.size()) {
      const std::vector<Piece> pieces = pieces_of(buckets[b], group.rank(), group.size());
      std::vector<at::Tensor> parts;
      for (const Piece& its : pieces) parts.push_back(part(piece++, its));
      whole = at::empty({buckets[b].size}, options);
      next = group.all_gather(flatten_share(pieces, parts, buckets[b].size / group.size(), options), whole);
    }
    host_waits ? under_way.finish() : under_way.wait();
    if (b > 0) use(buckets[b - 1], before);
    before = whole;
    under_way = std::move(next);
  }
}

}  // namespace

void share_weights(model::Weights& weights, const std::vector<Bucket>& buckets, ProcessGroup& group) {
  const at::NoGradGuard no_grad;
  auto& entries = weights.entries();
  gather(
      buckets, options_of(weights), group, /*host_waits=*/false,
      [&](size_t, const Piece& piece) {
        return entries[piece.parameter].second.detach().view({-1}).narrow(0, piece.begin, piece.size);
      },
      [&](const Bucket& bucket, const at::Tensor& whole) {
        for (const BucketEntry& entry : bucket.entries) {
          entries[entry.parameter].second.detach().view({-1}).copy_(
              whole.narrow(0, entry.offset, entry.size));
        }
      });
}

formats::NamedTensors gather_moments(const Optimizer& optimizer, const model::Weights& weights,
                                     const std::vector<Bucket>& buckets, ProcessGroup& group) {
  const auto& entries = weights.entries();
  formats::NamedTensors moments;
  if (group.leads()) {
    for (const char* kind : {"first_moment.", "second_moment."}) {
      for (const auto& [name, tensor] : entries) moments.emplace_back(kind + name, at::Tensor());
    }
  }
  size_t first = 0;  // of the kind in `moments`
  for (const auto* parts : {&optimizer.first_moments(), &optimizer.second_moments()}) {
    gather(
        buckets, options_of(weights), group, /*host_waits=*/true,
        [&](size_t piece, const Piece&) { return (*parts)[piece]; },
        [&](const Bucket& bucket, const at::Tensor& whole) {
          if (!group.leads()) return;
          const at::Tensor on_host = whole.cpu();
          for (const BucketEntry& entry : bucket.entries) {
            moments[first + entry.parameter].second =
                on_host.narrow(0, entry.offset, entry.size).view(entries[entry.parameter].second.sizes());
          }
        });
    first += entries.size();
  }
  return moments;
}

void scatter_moments(const formats::NamedTensors& moments, Optimizer& optimizer,
                     const model::Weights& weights, const std::vector<Bucket>& buckets, ProcessGroup& group) {
  const at::TensorOptions options = options_of(weights);
  size_t first = 0;
  for (const auto* parts : {&optimizer.first_moments(), &optimizer.second_moments()}) {
    size_t i = 0;
    for (const Bucket& bucket : buckets) {
      at::Tensor whole = at::empty({bucket.size}, options);
      if (group.leads()) {
        std::vector<at::Tensor> tensors;
        for (const BucketEntry& entry : bucket.entries)
          tensors.push_back(moments[first + entry.parameter].second);
        whole.copy_(flatten(bucket, tensors, options.device(at::kCPU)));
      }
      group.broadcast(whole).finish();
      const int64_t begin = bucket.size / group.size() * group.rank();
      for (const Piece& piece : pieces_of(bucket, group.rank(), group.size())) {
        (*parts)[i++].copy_(whole.narrow(0, begin + piece.offset, piece.size));
      }
    }
    first += weights.entries().size();
  }
}

}  // namespace oryx::training
