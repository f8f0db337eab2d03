#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "evaluation/report/paper.h"
#include "evaluation/report/report.h"
#include "evaluation/report/section_tools.h"

namespace oryx::evaluation {

namespace {

// A column: one metric of one task.
struct Column {
  std::string task, metric;
  bool operator==(const Column&) const = default;
};

// A row: one model under one schedule.
struct Line {
  const EvaluationSource* evaluation;
  const ScheduleScores* run;
};

struct Group {
  const char* name;
  const char* title;
  const char* caption;
};

constexpr Group kGroups[] = {
    {"language", "Language", "Zero-shot, scored as lm-evaluation-harness scores them."},
    {"retrieval", "Retrieval from texts",
     "Greedy answers that contain one of the accepted answers. SQuAD and DROP are asked as questions here, "
     "the paper's six "
     "tasks as cloze texts: its averages are not comparable, only the differences between modes are."},
    {"needle", "Needle in a haystack", "Greedy answers that contain the needle's value."},
    {"recall", "Associative recall", "Values named after their keys, made on the fly."},
};

// Main metrics, and beside LAMBADA's accuracy its perplexity; in the order of the files.
std::vector<Column> columns_of(const std::vector<Line>& lines, const std::string& group) {
  std::vector<Column> columns;
  const auto add = [&](const Column& column) {
    if (std::find(columns.begin(), columns.end(), column) == columns.end()) columns.push_back(column);
  };
  for (const Line& line : lines) {
    for (const TaskScore& task : line.run->tasks) {
      if (task.group != group) continue;
      if (task.task == "lambada" && task.metric("ppl")) add({task.task, "ppl"});
      add({task.task, task.main});
    }
  }
  return columns;
}

std::optional<double> value_of(const Line& line, const Column& column) {
  const TaskScore* task = line.run->task(column.task);
  const MetricValue* metric = task ? task->metric(column.metric) : nullptr;
  return metric ? metric->value : std::nullopt;
}

std::optional<double> average_of(const Line& line, const std::string& group) {
  const auto found = line.run->averages.find(group);
  return found == line.run->averages.end() ? std::nullopt : std::optional(found->second);
}

// As printed: values that look equal are equally good.
template <class Get>
std::string best_text(const std::vector<Line>& lines, const std::string& metric, Get get) {
  std::optional<double> best, worst;
  for (const Line& line : lines) {
    const std::optional<double> value = get(line);
    if (!value) continue;
    const bool loss = is_loss(metric);
    if (!best || (loss ? *value < *best : *value > *best)) best = value;
    if (!worst || (loss ? *value > *worst : *value < *worst)) worst = value;
  }
  if (!best) return "";
  // Where all look the same none is the best.
  const std::string text = metric_text(metric, *best);
  return text == metric_text(metric, *worst) ? "" : text;
}

Cell score_cell(const Line& line, const Column& column, const std::string& best) {
  const TaskScore* task = line.run->task(column.task);
  const MetricValue* metric = task ? task->metric(column.metric) : nullptr;
  if (!metric) return number_cell("–");
  if (!metric->value) return number_cell("∞");
  const std::string text = metric_text(column.metric, *metric->value);
  std::string html = text;
  if (metric->standard_error)
    html += fmt::format(" <small>± {}</small>",
                        error_text(column.metric, *metric->value, *metric->standard_error));
  return number_cell(html, text == best);
}

Cell paper_cell(const Line& line, const std::string& group) {
  const std::vector<std::string> mixers = comparable_mixers(*line.evaluation);
  if (group == "language") {
    const auto figure =
        paper_language(mixers, line.run->schedule, static_cast<double>(line.evaluation->parameters));
    if (figure) return number_cell(fmt::format("{:.1f} <small>{}</small>", figure->value, figure->size));
  } else if (const PaperRetrieval* row = paper_retrieval(mixers, line.run->schedule)) {
    return number_cell(
        fmt::format("{:.1f} <small>1.4B</small>", group == "needle" ? row->needle : row->retrieval));
  }
  return number_cell("–");
}

std::string items_text(const std::vector<Line>& lines, const std::vector<Column>& columns) {
  std::string text;
  for (const Column& column : columns) {
    std::set<int64_t> items;
    for (const Line& line : lines) {
      if (const TaskScore* task = line.run->task(column.task)) items.insert(task->items);
    }
    const std::string entry = fmt::format("{} {}{}", escape_markup(task_title(column.task)), *items.begin(),
                                          items.size() > 1 ? fmt::format("–{}", *items.rbegin()) : "");
    if (text.find(entry) == std::string::npos) text += (text.empty() ? "" : ", ") + entry;
  }
  return text;
}

std::string group_table(const Sources& sources, const std::vector<Line>& all, const Group& group) {
  std::vector<Line> lines;
  for (const Line& line : all) {
    const bool has = std::any_of(line.run->tasks.begin(), line.run->tasks.end(),
                                 [&](const TaskScore& task) { return task.group == group.name; });
    if (has) lines.push_back(line);
  }
  if (lines.empty()) return "";
  const std::vector<Column> columns = columns_of(lines, group.name);
  const bool has_average = std::any_of(
      lines.begin(), lines.end(), [&](const Line& line) { return average_of(line, group.name).has_value(); });
  const bool has_paper = group.name != std::string("recall");
  const auto average = [&](const Line& line) { return average_of(line, group.name); };
  const std::string best_average = best_text(lines, "acc", average);

  HtmlTable table;
  Row head = {{"Schedule"}};
  std::vector<std::string> best;
  for (const Column& column : columns) {
    head.push_back(
        {fmt::format("{}<br><small>{}{}</small>", escape_markup(task_title(column.task)),
                     escape_markup(metric_title(column.metric)), is_loss(column.metric) ? " ↓" : " %"),
         "number"});
    best.push_back(best_text(lines, column.metric, [&](const Line& line) { return value_of(line, column); }));
  }
  if (has_average) head.push_back({"Average<br><small>%</small>", "number"});
  if (has_paper) head.push_back({"Paper<br><small>average, size</small>", "number"});
  table.head = {head};
  const EvaluationSource* current = nullptr;
  for (const Line& line : lines) {
    if (line.evaluation != current) {
      current = line.evaluation;
      const std::string size =
          current->parameters > 0
              ? ", " + count_text(static_cast<double>(current->parameters)) + " parameters"
              : "";
      table.groups.push_back({escape_markup(evaluation_label(*current, sources)) +
                                  fmt::format(" <small>{}{}</small>", escape_markup(current->model), size),
                              {}});
    }
    Row row = {{fmt::format("<code>{}</code>", escape_markup(line.run->schedule))}};
    for (size_t i = 0; i < columns.size(); ++i) row.push_back(score_cell(line, columns[i], best[i]));
    if (has_average) {
      const std::optional<double> value = average(line);
      const std::string text = value ? metric_text("acc", *value) : "–";
      row.push_back(number_cell(text, value && text == best_average));
    }
    if (has_paper) row.push_back(paper_cell(line, group.name));
    table.groups.back().rows.push_back(std::move(row));
  }
  const size_t width = columns.size() + 1 + (has_average ? 1 : 0) + (has_paper ? 1 : 0);
  table.css = width > 7 ? "stacked" : width < 5 ? "narrow" : "";
  table.caption = fmt::format(
      "{} Items: {}. ± one standard error over items; ↓: less is better; the best of a column is bold.{}",
      group.caption, items_text(lines, columns),
      has_paper
          ? " The paper's column: its average for this variant and mode, at the size nearest to this model "
            "(retrieval: 1.4 billion parameters), after 100 billion tokens."
          : "");
  return fmt::format("<h3>{}</h3>\n", group.title) + to_html(table);
}

std::string paper_tables() {
  HtmlTable language;
  Row head = {{"Language average, %"}};
  for (int i = 0; i < kPaperModels; ++i)
    head.push_back({paper_model_name(static_cast<PaperModel>(i)), "number"});
  language.head = {head};
  language.groups.emplace_back();
  for (const PaperLanguage& size : kPaperLanguage) {
    Row row = {{size.size}};
    const double best = *std::max_element(size.average.begin(), size.average.end());
    for (const double value : size.average)
      row.push_back(number_cell(fmt::format("{:.1f}", value), value == best));
    language.groups[0].rows.push_back(std::move(row));
  }
  language.caption = "Average of seven language tasks after 100 billion tokens of FineWeb-Edu.";
  HtmlTable retrieval;
  retrieval.head = {
      {{"1.4 billion parameters"}, {"Mode"}, {"Real texts, %", "number"}, {"Needle, %", "number"}}};
  retrieval.css = "narrow";
  retrieval.groups.emplace_back();
  for (const PaperRetrieval& row : kPaperRetrieval) {
    retrieval.groups[0].rows.push_back({{row.model},
                                        {escape_markup(row.mode)},
                                        number_cell(fmt::format("{:.1f}", row.retrieval)),
                                        number_cell(fmt::format("{:.1f}", row.needle))});
  }
  retrieval.caption = "Averages of six retrieval tasks from real texts and of the three single needles.";
  return "<h3>The paper’s figures</h3>\n<p>From “Multi-Mixer Models: Flexible Sequence Modeling with Shared "
         "Representations” (Li, Trockman, Suresh, Sun; arXiv 2605.28769), for comparison.</p>\n" +
         to_html(language) + to_html(retrieval);
}

}  // namespace

Section tasks_section(const Sources& sources) {
  Section section{"tasks", "Tasks", ""};
  std::vector<Line> lines;
  for (const EvaluationSource& evaluation : sources.evaluations) {
    for (const ScheduleScores& run : evaluation.runs) lines.push_back({&evaluation, &run});
  }
  for (const Group& group : kGroups) section.html += group_table(sources, lines, group);
  if (section.html.empty()) return section;
  section.html += paper_tables();
  for (const EvaluationSource& evaluation : sources.evaluations) {
    if (evaluation.command.empty()) continue;
    section.html += fmt::format("<p class=\"note\">{}, on {}: <code>{}</code></p>\n",
                                escape_markup(evaluation_label(evaluation, sources)),
                                escape_markup(evaluation.device), escape_markup(evaluation.command));
  }
  return section;
}

}  // namespace oryx::evaluation
