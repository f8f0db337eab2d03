#include "evaluation/retrieval.h"

#include "evaluation/questions.h"
#include "evaluation/task_data.h"

namespace oryx::evaluation {

namespace {

class RetrievalTask final : public Task {
 public:
  RetrievalTask(const std::string& name, const std::string& file, const TaskOptions& options,
                const tokenizer::Tokenizer& tokenizer)
      : Task(name, "retrieval"), max_new_tokens_(options.max_new_tokens) {
    for (const Record& record : read_records(file, options.limit)) {
      questions_.push_back(make_question(tokenizer, record.text("context"), record.text("prompt"),
                                         record.texts("answers", 1), options.context_tokens, record.where()));
    }
  }

  int64_t items() const override { return static_cast<int64_t>(questions_.size()); }

  std::optional<TaskResult> run(const ScheduleForm& schedule, const Runner& runner) const override {
    TaskResult result{.items = items(), .main = "contains"};
    const auto answers = answer_all(questions_, schedule, max_new_tokens_, runner, result);
    if (!answers) return std::nullopt;
    for (size_t i = 0; i < questions_.size(); ++i) {
      result.records.push_back(answer_record(static_cast<int64_t>(i), questions_[i], (*answers)[i]));
    }
    result.metrics = {contains_metric(*answers)};
    return result;
  }

 private:
  std::vector<Question> questions_;
  int64_t max_new_tokens_;
};

}  // namespace

std::unique_ptr<const Task> make_retrieval_task(const std::string& name, const TaskOptions& options,
                                                const tokenizer::Tokenizer& tokenizer) {
  return make_retrieval_task_of(name, data_file(name, options, name + ".jsonl"), options, tokenizer);
}

std::unique_ptr<const Task> make_retrieval_task_of(const std::string& name, const std::string& file,
                                                   const TaskOptions& options,
                                                   const tokenizer::Tokenizer& tokenizer) {
  return std::make_unique<RetrievalTask>(name, file, options, tokenizer);
}

}  // namespace oryx::evaluation
