// Tasks scored by log-likelihood, as lm-evaluation-harness scores them.
#pragma once

#include <memory>
#include <string>

#include "evaluation/task.h"

namespace oryx::evaluation {

// "lambada": the last word of a passage. ppl, and acc: whether greedy decoding gives it.
std::unique_ptr<const Task> make_continuation_task(const std::string& name, const TaskOptions& options,
                                                   const tokenizer::Tokenizer& tokenizer);

// A context and choices, of which the gold one should be the most likely: acc by log-likelihood, acc_norm by
// log-likelihood per byte of the choice, the space before it not counted. `main` names the one for averages.
std::unique_ptr<const Task> make_choice_task(const std::string& name, const std::string& main,
                                             const TaskOptions& options,
                                             const tokenizer::Tokenizer& tokenizer);

// "winogrande": one continuation after each of several contexts; acc by its log-likelihood alone.
std::unique_ptr<const Task> make_context_task(const std::string& name, const TaskOptions& options,
                                              const tokenizer::Tokenizer& tokenizer);

// "wikitext": whole pages by rolling windows; word_perplexity, byte_perplexity and bits_per_byte, words and
// bytes being those of the page before detokenization.
std::unique_ptr<const Task> make_rolling_task(const std::string& name, const TaskOptions& options,
                                              const tokenizer::Tokenizer& tokenizer);

}  // namespace oryx::evaluation
