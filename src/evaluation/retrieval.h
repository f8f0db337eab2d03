// Questions about a document, from JSON lines of context, prompt and answers.
#pragma once

#include <memory>
#include <string>

#include "evaluation/task.h"

namespace oryx::evaluation {

// Of DATA/NAME.jsonl. `contains`: the share of greedy continuations in which an answer stands.
std::unique_ptr<const Task> make_retrieval_task(const std::string& name, const TaskOptions& options,
                                                const tokenizer::Tokenizer& tokenizer);
// The same of any file.
std::unique_ptr<const Task> make_retrieval_task_of(const std::string& name, const std::string& file,
                                                   const TaskOptions& options,
                                                   const tokenizer::Tokenizer& tokenizer);

}  // namespace oryx::evaluation
