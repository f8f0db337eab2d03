// Needles in haystacks, as RULER (Hsieh et al., 2024) makes them, and key-value retrieval as "Lost in the
// Middle" (Liu et al., 2023): texts made on the fly, at any length and depth.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "evaluation/task.h"

namespace oryx::evaluation {

struct NeedleKind {
  enum class Haystack { noise, essay, needles, pairs };
  enum class Word { words, numbers, uuids };

  Haystack haystack;  // pairs: a JSON object of keys and values, without sentences
  Word key, value;
  int64_t keys = 1;  // needles, one of which is asked for
};

// needle_single_1: noise, number; _2: essay, number; _3: essay, uuid. needle_multikey_1: four needles in an
// essay; _2: among other needles; _3: the same with uuids for keys and values. kv_uuid: pairs of uuids.
NeedleKind needle_kind(const std::string& task);

struct NeedleText {
  std::string context;  // the instruction and the haystack with its needles
  std::string prompt;   // the question and the beginning of its answer
  std::string answer;
  double depth = 0;  // the share of the haystack's units before the needle asked for
};

// A pure function of its arguments. `units` of haystack: sentences, words of the essay, needles or pairs.
// `depth` in [0, 1]. An essay shorter than that is read again from its start.
NeedleText make_needle(const NeedleKind& kind, int64_t units, double depth,
                       const std::vector<std::string>& essay, uint64_t seed, uint64_t sample);

// The words of a text file (as `oryx prepare` reads it), up to `count`.
std::vector<std::string> read_words(const std::string& path, size_t count);

// options.needle_samples items a length, spread over the depths in turn; prompt and answer together have at
// most `length` tokens. `contains`, overall and for each length and depth.
std::unique_ptr<const Task> make_needle_task(const std::string& name, const TaskOptions& options,
                                             const tokenizer::Tokenizer& tokenizer);

}  // namespace oryx::evaluation
