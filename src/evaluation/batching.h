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

// Every item once. Items of similar shape stand together; another one joins a batch while that costs fewer
// tokens, padding included, than a forward pass of its own, which counts as `pass_cost` tokens more. The
// batches depend on the items' shapes and tokens, not on their order.
std::vector<Batch> plan_batches(const std::vector<Item>& items, int64_t batch_tokens, int64_t pass_cost,
                                bool share_prefixes);

}  // namespace oryx::evaluation
