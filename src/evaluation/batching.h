// Which items run together, and how much of what each begins with is read once for all its sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "evaluation/scoring.h"

namespace oryx::evaluation {

struct Batch {
  std::vector<size_t> items;
  int64_t shared = 0;  // leading tokens read once an item; all items have as many in common
};

// The leading tokens that all sequences of the item have in common, modes included, and that no score is read
// from: at most min(first) − 1.
int64_t shared_prefix(const Item& item);

// Every item once, sorted by shape and cut into the batches that cost least: the tokens computed, padding
// included, and for every forward pass `pass_cost` tokens more. The batches depend on the items' shapes and
// tokens, not on their order.
std::vector<Batch> plan_batches(const std::vector<Item>& items, int64_t batch_tokens, int64_t pass_cost,
                                bool share_prefixes);

}  // namespace oryx::evaluation
