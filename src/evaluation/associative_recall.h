// Multi-query associative recall (MQAR; Arora et al., 2023, "Zoology"): pairs of keys and values, then the
// keys again in another order, each to be followed by its value. The smallest task that tells attention from
// recurrences whose state is too small. Token ids alone: any model can be asked, and trained
// (`oryx prepare --task mqar`).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "evaluation/task.h"

namespace oryx::evaluation {

struct RecallShape {
  int64_t length = 256;    // tokens of a sequence
  int64_t pairs = 16;      // distinct keys; four tokens a pair fit into the length
  int64_t vocabulary = 0;  // ids 0 … vocabulary−1: keys from the lower half, values from the upper one, the
                           // last id fills
  int64_t queries = 0;  // of which the first `pairs` ask for every key once, the others for any; 0: as many
                        // as pairs

  int64_t slots() const { return (length - 2 * pairs) / 2; }  // for a query and its value
};

// Throws UsageError when pairs or queries do not fit into the length or the keys into the vocabulary.
void validate(const RecallShape& shape);

enum class RecallSplit : uint64_t { training, evaluation };  // never the same sequence

struct RecallSequence {
  std::vector<int64_t> tokens;
  std::vector<int64_t> values;  // where the values that are asked for stand, ascending
};

// k v k v … then slots of two tokens, `queries` of which hold a query and its value, the rest filler. Gaps
// between a pair and its query follow a power law, as in the paper: near slots are likelier.
RecallSequence make_recall(const RecallShape& shape, RecallSplit split, uint64_t seed, uint64_t index);

// Ids that name no special token, from 0 on.
int64_t plain_vocabulary(const tokenizer::Tokenizer& tokenizer);

// "mqar": options.mqar_samples sequences for each number of pairs. acc: the share of values that are the most
// likely token after their key.
std::unique_ptr<const Task> make_recall_task(const std::string& name, const TaskOptions& options,
                                             const tokenizer::Tokenizer& tokenizer);

}  // namespace oryx::evaluation
