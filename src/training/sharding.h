// Optimizer state that every rank holds a part of (ZeRO stage 1: Rajbhandari et al. 2020): each updates the
// pieces of the weights whose moments it has, and the weights are put together again.
#pragma once

#include <vector>

#include "formats/safetensors.h"
#include "model/weights.h"
#include "training/buckets.h"
#include "training/optimizer.h"
#include "training/process_group.h"

namespace oryx::training {

// After an update of its pieces by every rank: all weights on all ranks.
void share_weights(model::Weights& weights, const std::vector<Bucket>& buckets, ProcessGroup& group);

// The moments of all ranks as Optimizer::moments() gives them where they are whole: on the CPU of rank 0. The
// other ranks get an empty list. Every rank calls it.
formats::NamedTensors gather_moments(const Optimizer& optimizer, const model::Weights& weights,
                                     const std::vector<Bucket>& buckets, ProcessGroup& group);

// Fills the pieces of every rank from what gather_moments() gave; the list is looked at on rank 0 only.
void scatter_moments(const formats::NamedTensors& moments, Optimizer& optimizer,
                     const model::Weights& weights, const std::vector<Bucket>& buckets, ProcessGroup& group);

}  // namespace oryx::training
