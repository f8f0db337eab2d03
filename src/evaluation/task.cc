#include "evaluation/task.h"

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "base/nearest_name.h"
#include "evaluation/associative_recall.h"
#include "evaluation/language_tasks.h"
#include "evaluation/needle.h"
#include "evaluation/retrieval.h"

namespace oryx::evaluation {

namespace {

struct Entry {
  const char* name;
  const char* group;
  std::unique_ptr<const Task> (*make)(const std::string& name, const TaskOptions& options,
                                      const tokenizer::Tokenizer& tokenizer);
};

template <bool by_byte>
std::unique_ptr<const Task> make_choices(const std::string& name, const TaskOptions& options,
                                         const tokenizer::Tokenizer& tokenizer) {
  return make_choice_task(name, by_byte ? "acc_norm" : "acc", options, tokenizer);
}

// clang-format off
constexpr Entry kTasks[] = {
    {"lambada", "language", make_continuation_task},
    {"hellaswag", "language", make_choices<true>},
    {"piqa", "language", make_choices<false>},
    {"arc_easy", "language", make_choices<false>},
    {"arc_challenge", "language", make_choices<true>},
    {"winogrande", "language", make_context_task},
    {"openbookqa", "language", make_choices<false>},
    {"wikitext", "language", make_rolling_task},
    {"squad", "retrieval", make_retrieval_task},
    {"drop", "retrieval", make_retrieval_task},
    {"needle_single_1", "needle", make_needle_task},
    {"needle_single_2", "needle", make_needle_task},
    {"needle_single_3", "needle", make_needle_task},
    {"needle_multikey_1", "needle", make_needle_task},
    {"needle_multikey_2", "needle", make_needle_task},
    {"needle_multikey_3", "needle", make_needle_task},
    {"kv_uuid", "needle", make_needle_task},
    {"mqar", "recall", make_recall_task},
};
// clang-format on

const Entry* find_entry(const std::string& name) {
  const auto* entry = std::find_if(std::begin(kTasks), std::end(kTasks),
                                   [&](const Entry& task) { return name == task.name; });
  return entry == std::end(kTasks) ? nullptr : entry;
}

}  // namespace

std::vector<std::string> task_names() {
  std::vector<std::string> names;
  for (const Entry& task : kTasks) names.emplace_back(task.name);
  return names;
}

std::vector<std::string> expand_tasks(const std::vector<std::string>& names, TaskOptions& options) {
  std::vector<std::string> tasks;
  const auto add = [&](const std::string& name) {
    if (std::find(tasks.begin(), tasks.end(), name) == tasks.end()) tasks.push_back(name);
  };
  for (const std::string& name : names) {
    if (name.ends_with(".jsonl")) {
      const std::string stem = std::filesystem::path(name).stem().string();
      add_retrieval(stem, name, options);
      add(stem);
      continue;
    }
    bool known = false;
    for (const Entry& task : kTasks) {
      if (name != "all" && name != task.group && name != task.name) continue;
      add(task.name);
      known = true;
    }
    if (!known && !options.retrieval.contains(name)) {
      std::vector<std::string> valid = task_names();
      valid.insert(valid.end(), {"language", "retrieval", "needle", "recall", "all"});
      for (const auto& [other, file] : options.retrieval) valid.push_back(other);
      fail_usage("unknown task '{}', did you mean '{}'?", name, nearest_name(name, valid));
    }
  }
  // Naming a file asks for it.
  for (const auto& [name, file] : options.retrieval) add(name);
  return tasks;
}

void add_retrieval(const std::string& name, const std::string& file, TaskOptions& options) {
  const auto is_plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '.' || c == '-';
  };
  if (name.empty() || !std::all_of(name.begin(), name.end(), is_plain)) {
    fail_usage("task name '{}': expected letters, digits, _ . and - only", name);
  }
  if (find_entry(name)) {
    fail_usage("{} is the name of another task: pass the file as --retrieval NAME={}", name, file);
  }
  const auto [entry, is_new] = options.retrieval.emplace(name, file);
  if (!is_new && entry->second != file) {
    fail_usage("retrieval task {} is given twice: as {} and as {}", name, entry->second, file);
  }
}

void validate(const TaskOptions& options) {
  const auto at_least_one = [](const char* option, int64_t value) {
    if (value < 1) fail_usage("{} is {}: expected at least 1", option, value);
  };
  at_least_one("max-length", options.max_length);
  at_least_one("context-tokens", options.context_tokens);
  at_least_one("max-new-tokens", options.max_new_tokens);
  at_least_one("needle-samples", options.needle_samples);
  at_least_one("mqar-length", options.mqar_length);
  at_least_one("mqar-samples", options.mqar_samples);
  for (const int64_t length : options.needle_lengths) at_least_one("needle-lengths", length);
  for (const int64_t pairs : options.mqar_pairs) at_least_one("mqar-pairs", pairs);
  for (const double depth : options.needle_depths) {
    if (!(depth >= 0 && depth <= 100)) fail_usage("needle-depths has {}: expected per cent, 0 to 100", depth);
  }
}

std::unique_ptr<const Task> make_task(const std::string& name, const TaskOptions& options,
                                      const tokenizer::Tokenizer& tokenizer) {
  if (const Entry* entry = find_entry(name)) return entry->make(name, options, tokenizer);
  return make_retrieval_task_of(name, options.retrieval.at(name), options, tokenizer);
}

}  // namespace oryx::evaluation
