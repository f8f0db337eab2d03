// How a run begins: afresh, from another model, or where its newest checkpoint stands. Of several ranks only
// rank 0 looks into the run directory; the others get from it what they need.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <optional>

#include "model/weights.h"
#include "training/buckets.h"
#include "training/checkpoint.h"
#include "training/data.h"
#include "training/gradient_exchange.h"
#include "training/optimizer.h"
#include "training/process_group.h"
#include "training/recipe.h"
#include "training/validation.h"

namespace oryx::training {

// The recipe with what only the data says: which tokenizer the model goes with.
Recipe for_data(Recipe recipe, const SequenceSource& data);

// The sequences of every batch that are this rank's; all of them without a group. Throws Error when there are
// fewer than ranks, and when this rank is about to train by another recipe or on other data than rank 0.
Share agreed_share(const Recipe& recipe, const DataIdentity& data,
                   const std::optional<Validation>& validation, ProcessGroup* group);

// The state of the run in `checkpoint`, which must be one of this recipe and this data.
TrainingState matching_state(const std::filesystem::path& checkpoint, const Recipe& recipe,
                             const DataIdentity& data);

// The weights of the checkpoint, of the initial model, or fresh ones.
model::Weights starting_weights(const Recipe& recipe, const std::optional<std::filesystem::path>& checkpoint,
                                c10::Device device, ProcessGroup* group);

// For every rank the moments that it holds, from the checkpoint that rank 0 names; nothing without one.
// `exchange` and `group` are null for a rank on its own.
void restore_moments(const std::optional<std::filesystem::path>& checkpoint, bool shard, Optimizer& optimizer,
                     const model::Weights& weights, const GradientExchange* exchange, ProcessGroup* group);

}  // namespace oryx::training
