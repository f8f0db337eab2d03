#include "schedule/training_draw.h"

#include "base/error.h"
#include "base/random.h"
#include "schedule/chunks.h"

namespace oryx::schedule {
namespace {

constexpr uint64_t kTrainingStream = 0x747261696E696E67;  // "training": apart from other users of the seed

}  // namespace

void validate(const TrainingDraw& draw) {
  expect(draw.attention_probability >= 0 && draw.attention_probability <= 1,
         "expected attention_probability in 0 … 1, got {}", draw.attention_probability);
  expect(draw.chunk >= 1, "expected a chunk of at least 1 token, got {}", draw.chunk);
}

ModeSpans draw(const TrainingDraw& draw, int64_t length, uint64_t seed, uint64_t step, uint64_t sequence) {
  validate(draw);
  expect(length >= 0, "expected a sequence length of at least 0, got {}", length);
  const uint64_t key = random_u64(random_u64(seed, kTrainingStream, step), 0, sequence);
  const int64_t chunk = draw.per_sequence ? std::max<int64_t>(length, 1) : draw.chunk;
  return chunked_spans(length, chunk, [&](uint64_t index) {
    return random_uniform(key, 0, index) < draw.attention_probability ? Mode::attention : Mode::linear;
  });
}

}  // namespace oryx::schedule
