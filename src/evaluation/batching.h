// Which sequences run together, and how much of what the sequences of an item begin with is read once.
#pragma once

#include <cstdint>
#include <vector>

#include "evaluation/scoring.h"

namespace oryx::evaluation {

// One sequence of an item of a batch.
struct Row {
  size_t item;      // among the batch's items
  size_t sequence;  // of the item
};

// Items whose common tokens one forward pass reads, and the passes that read the rest of their sequences.
struct Batch {
  std::vector<size_t> items;
  std::vector<int64_t> shared;           // of each item, leading tokens read once; all 0: no such pass
  std::vector<std::vector<Row>> passes;  // every sequence of the items once

  bool shares() const { return shared.front() > 0; }
};

struct BatchOptions {
  int64_t batch_tokens = 4096;  // of the sequences of a pass, padding included; a longer one runs alone
  int64_t pass_cost = 16;       // tokens that could be computed in the time that starting a pass takes
  bool share_prefixes = true;
};

// The leading tokens that all sequences of the item have in common, modes included, and that no score is read
// from: at most min(first) − 1.
int64_t shared_prefix(const Item& item);

// Every item once. Both what is read once and what is not are sorted by length and cut into the passes that
// cost least: the tokens computed, padding included, and `pass_cost` for every pass. The plan depends on the
// items' shapes and tokens, not on their order.
std::vector<Batch> plan_batches(const std::vector<Item>& items, const BatchOptions& options);

// Tokens that the model computes for a batch, padding included.
int64_t computed_tokens(const Batch& batch, const std::vector<Item>& items);

}  // namespace oryx::evaluation
