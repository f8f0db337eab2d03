#include "cli/prepare_recall.h"

#include "base/error.h"
#include "base/progress.h"
#include "base/random.h"
#include "cli/options.h"
#include "evaluation/associative_recall.h"
#include "formats/token_shards.h"

namespace oryx::cli {

namespace {
constexpr uint64_t kQueries = 0x71756572;  // "quer": the stream of their numbers
}  // namespace

int64_t write_recall_shards(const RecallOptions& options, const tokenizer::Tokenizer& tokenizer,
                            uint64_t seed, int64_t shard_tokens, const std::filesystem::path& directory) {
  if (options.sequences < 1) fail_usage("sequences is {}: expected at least 1", options.sequences);
  if (options.pairs.empty()) fail_usage("pairs is empty: expected at least one number");
  const int64_t vocabulary = evaluation::plain_vocabulary(tokenizer);
  for (const int64_t pairs : options.pairs) {
    evaluation::validate(evaluation::RecallShape{options.length, pairs, vocabulary});
  }
  formats::TokenShardWriter writer(directory,
                                   {tokenizer.identity(), tokenizer.vocabulary_size(), shard_tokens});
  ProgressBar bar(options.sequences, "prepare");
  for (int64_t i = 0; i < options.sequences; ++i) {
    if (interrupted()) throw Interrupted{};
    const int64_t pairs = options.pairs[static_cast<size_t>(i) % options.pairs.size()];
    evaluation::RecallShape shape{options.length, pairs, vocabulary};
    const auto more = static_cast<uint64_t>(shape.slots() - pairs);
    shape.queries =
        pairs + static_cast<int64_t>(random_u64(seed, kQueries, static_cast<uint64_t>(i)) % (more + 1));
    const auto sequence =
        evaluation::make_recall(shape, evaluation::RecallSplit::training, seed, static_cast<uint64_t>(i));
    const std::vector<int32_t> tokens(sequence.tokens.begin(), sequence.tokens.end());
    writer.append(tokens);
    writer.end_document();
    bar.advance();
  }
  writer.finish();
  return writer.tokens();
}

}  // namespace oryx::cli
