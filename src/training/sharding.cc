#include "training/sharding.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <functional>

#include "operators/activations.h"

namespace oryx::training {

namespace {

// Of the weights in a bucket, as products read them.
at::TensorOptions options_of(const model::Weights& weights, const Bucket& bucket) {
  return weights.entries()[bucket.entries.front().parameter].second.detach().options();
}

// The same of what is updated, and of the moments.
at::TensorOptions master_options(const at::TensorOptions& options) {
  return options.dtype(operators::accumulate_type(c10::typeMetaToScalarType(options.dtype())));
}

// For every bucket the shares of all ranks, put together: `parts` are of the pieces of this rank, `options`
// says in which type a bucket travels, and `use` gets each whole one. While one is used the next one is on
// its way.
void gather(const std::vector<Bucket>& buckets, const std::vector<at::Tensor>& parts, ProcessGroup& group,
            bool host_waits, const std::function<at::TensorOptions(const Bucket&)>& options,
            const std::function<void(const Bucket&, const at::Tensor&)>& use) {
  at::Tensor before;
  Exchange under_way;
  auto part = parts.begin();
  for (size_t b = 0; b <= buckets.size(); ++b) {
    at::Tensor whole;
    Exchange next;
    if (b < buckets.size()) {
      const std::vector<Piece> pieces = pieces_of(buckets[b], group.rank(), group.size());
      const std::vector<at::Tensor> own(part, part + static_cast<int64_t>(pieces.size()));
      part += static_cast<int64_t>(pieces.size());
      const at::TensorOptions type = options(buckets[b]);
      whole = at::empty({buckets[b].size}, type);
      const int64_t size = buckets[b].size / group.size();
      next = group.all_gather(flatten_share(pieces, own, size, master_options(type)).to(whole.scalar_type()),
                              whole);
    }
    host_waits ? under_way.finish() : under_way.wait();
    if (b > 0) use(buckets[b - 1], before);
    before = whole;
    under_way = std::move(next);
  }
}

// Of every parameter the whole of `parts`, on the CPU of rank 0; elsewhere undefined tensors.
std::vector<at::Tensor> gather_on_host(const std::vector<at::Tensor>& parts, const model::Weights& weights,
                                       const std::vector<Bucket>& buckets, ProcessGroup& group) {
  std::vector<at::Tensor> tensors(weights.entries().size());
  gather(
      buckets, parts, group, /*host_waits=*/true,
      [&](const Bucket& bucket) { return master_options(options_of(weights, bucket)); },
      [&](const Bucket& bucket, const at::Tensor& whole) {
        if (!group.leads()) return;
        const at::Tensor on_host = whole.cpu();
        for (const BucketEntry& entry : bucket.entries) {
          tensors[entry.parameter] = on_host.narrow(0, entry.offset, entry.size)
                                         .view(weights.entries()[entry.parameter].second.sizes());
        }
      });
  return tensors;
}

}  // namespace

std::vector<at::Tensor> take_masters(model::Weights& weights, const std::vector<model::ParameterSpec>& specs,
                                     at::ScalarType compute_dtype, const std::vector<Piece>& pieces) {
  std::vector<at::Tensor> masters;
  for (const Piece& piece : pieces) {
    const at::Tensor& weight = weights.entries()[piece.parameter].second;
    const at::Tensor view = weight.detach().view({-1}).narrow(0, piece.begin, piece.size);
    const bool rounds = specs[piece.parameter].is_matrix && weight.scalar_type() != compute_dtype;
    masters.push_back(rounds ? view.clone() : view);
  }
  model::round_matrices(weights, specs, compute_dtype);
  return masters;
}

void share_weights(model::Weights& weights, const Optimizer& optimizer, const std::vector<Bucket>& buckets,
                   ProcessGroup& group) {
  const at::NoGradGuard no_grad;
  gather(
      buckets, optimizer.parameters(), group, /*host_waits=*/false,
      [&](const Bucket& bucket) { return options_of(weights, bucket); },
      [&](const Bucket& bucket, const at::Tensor& whole) {
        for (const BucketEntry& entry : bucket.entries) {
          weights.entries()[entry.parameter].second.detach().view({-1}).copy_(
              whole.narrow(0, entry.offset, entry.size));
        }
      });
}

model::Weights gather_masters(const Optimizer& optimizer, const model::Weights& weights,
                              const std::vector<Bucket>& buckets, ProcessGroup& group) {
  const auto& entries = weights.entries();
  const bool whole = std::all_of(entries.begin(), entries.end(), [](const auto& entry) {
    return entry.second.scalar_type() == operators::accumulate_type(entry.second.scalar_type());
  });
  if (whole) return weights;
  const std::vector<at::Tensor> tensors = gather_on_host(optimizer.parameters(), weights, buckets, group);
  model::Weights masters;
  if (!group.leads()) return masters;
  for (size_t i = 0; i < entries.size(); ++i) masters.add(entries[i].first, tensors[i]);
  return masters;
}

formats::NamedTensors gather_moments(const Optimizer& optimizer, const model::Weights& weights,
                                     const std::vector<Bucket>& buckets, ProcessGroup& group) {
  formats::NamedTensors moments;
  const auto add = [&](const std::string& kind, const std::vector<at::Tensor>& parts) {
    const std::vector<at::Tensor> tensors = gather_on_host(parts, weights, buckets, group);
    if (!group.leads()) return;
    for (size_t i = 0; i < tensors.size(); ++i) {
      moments.emplace_back(kind + weights.entries()[i].first, tensors[i]);
    }
  };
  add("first_moment.", optimizer.first_moments());
  add("second_moment.", optimizer.second_moments());
  return moments;
}

void scatter_moments(const formats::NamedTensors& moments, Optimizer& optimizer,
                     const model::Weights& weights, const std::vector<Bucket>& buckets, ProcessGroup& group) {
  size_t first = 0;
  for (const auto* parts : {&optimizer.first_moments(), &optimizer.second_moments()}) {
    size_t i = 0;
    for (const Bucket& bucket : buckets) {
      const at::TensorOptions options = master_options(options_of(weights, bucket));
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
