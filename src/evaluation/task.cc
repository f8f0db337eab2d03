#include "evaluation/task.h"

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "base/nearest_name.h"
#include "evaluation/language_tasks.h"

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

constexpr Entry kTasks[] = {
    {"lambada", "language", make_continuation_task},   {"hellaswag", "language", make_choices<true>},
    {"piqa", "language", make_choices<false>},         {"arc_easy", "language", make_choices<false>},
    {"arc_challenge", "language", make_choices<true>}, {"winogrande", "language", make_context_task},
    {"openbookqa", "language", make_choices<false>},   {"wikitext", "language", make_rolling_task},
};

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

std::vector<std::string> expand_tasks(const std::vector<std::string>& names, const TaskOptions&) {
  std::vector<std::string> tasks;
  const auto add = [&](const std::string& name) {
    if (std::find(tasks.begin(), tasks.end(), name) == tasks.end()) tasks.push_back(name);
  };
  for (const std::string& name : names) {
    bool known = false;
    for (const Entry& task : kTasks) {
      if (name != "all" && name != task.group && name != task.name) continue;
      add(task.name);
      known = true;
    }
    if (known) continue;
    std::vector<std::string> valid = task_names();
    for (const char* group : {"language", "all"}) valid.emplace_back(group);
    fail_usage("unknown task '{}', did you mean '{}'?", name, nearest_name(name, valid));
  }
  return tasks;
}

std::unique_ptr<const Task> make_task(const std::string& name, const TaskOptions& options,
                                      const tokenizer::Tokenizer& tokenizer) {
  return find_entry(name)->make(name, options, tokenizer);
}

}  // namespace oryx::evaluation
