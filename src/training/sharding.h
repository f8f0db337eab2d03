// Optimizer state and master weights that every rank holds a part of (ZeRO stage 1: Rajbhandari et al. 2020):
// each updates the pieces of the weights whose moments it has, and the weights are put together again.
#pragma once

#include <vector>

#include "formats/safetensors.h"
#include "model/weights.h"
#include "training/buckets.h"
#include "training/optimizer.h"
#include "training/process_group.h"

namespace oryx::training {

// What a rank updates: its pieces of the weights, one flat tensor each. Where products read matrices in
// another type than they are updated in, `weights` (one for every spec) keep only their rounding to
// `compute_dtype`, and the pieces of all ranks are the originals; elsewhere a piece is a view of its weight.
std::vector<at::Tensor> take_masters(model::Weights& weights, const std::vector<model::ParameterSpec>& specs,
                                     at::ScalarType compute_dtype, const std::vector<Piece>& pieces);

// After an update of its pieces by every rank: all weights on all ranks, in their own types.
void share_weights(model::Weights& weights, const Optimizer& optimizer, const std::vector<Bucket>& buckets,
                   ProcessGroup& group);

// The weights as they are updated. Where a rank has only its pieces of them: on the CPU of rank 0, and
// nothing on the others. Every rank calls it.
model::Weights gather_masters(const Optimizer& optimizer, const model::Weights& weights,
                              const std::vector<Bucket>& buckets, ProcessGroup& group);

// The moments of all ranks as Optimizer::moments() gives them where they are whole: on the CPU of rank 0. The
// other ranks get an empty list. Every rank calls it.
formats::NamedTensors gather_moments(const Optimizer& optimizer, const model::Weights& weights,
                                     const std::vector<Bucket>& buckets, ProcessGroup& group);

// Fills the pieces of every rank from what gather_moments() gave; the list is looked at on rank 0 only.
void scatter_moments(const formats::NamedTensors& moments, Optimizer& optimizer,
                     const model::Weights& weights, const std::vector<Bucket>& buckets, ProcessGroup& group);

}  // namespace oryx::training
