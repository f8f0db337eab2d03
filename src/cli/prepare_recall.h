// Token shards of multi-query associative recall, made instead of read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace oryx::cli {

struct RecallOptions {
  int64_t length = 128;                            // tokens of a sequence: the sequence_length of the recipe
  std::vector<int64_t> pairs = {2, 4, 8, 16, 32};  // in turn
  int64_t sequences = 100'000;
};

// Writes shards into an existing directory and returns the number of tokens. Every sequence counts as a
// document, without an end-of-text token: training sequence i is sequence i. The number of queries is drawn
// evenly from one a pair to all that there is room for, so that a large share of the tokens are answers: most
// of the others cannot be known. Throws
// UsageError on options that do not fit together, Interrupted after a signal.
int64_t write_recall_shards(const RecallOptions& options, const tokenizer::Tokenizer& tokenizer,
                            uint64_t seed, int64_t shard_tokens, const std::filesystem::path& directory);

}  // namespace oryx::cli
