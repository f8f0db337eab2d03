#include "evaluation/report/report.h"

#include <fmt/format.h>

#include <algorithm>

#include "evaluation/report/section_tools.h"

namespace oryx::evaluation {

namespace {

std::string headline(const TrainingSource& run) {
  std::string text = fmt::format("{} tokens in {} steps", count_text(run.tokens), run.steps);
  for (size_t i = 0; i < run.validation.size(); ++i) {
    const auto& [mode, points] = run.validation[i];
    if (points.y.empty()) continue;
    text += fmt::format("{}{:.3f} {}", i == 0 ? "; validation loss " : ", ", points.y.back(), mode);
  }
  return text;
}

std::string headline(const EvaluationSource& evaluation) {
  size_t tasks = 0;
  for (const ScheduleScores& run : evaluation.runs) tasks = std::max(tasks, run.tasks.size());
  return fmt::format("{}, {}, {} of model {}{}", plural(tasks, "task"),
                     plural(evaluation.runs.size(), "schedule"), evaluation.dtype, evaluation.model,
                     evaluation.limit ? fmt::format(", {} items a task", *evaluation.limit) : "");
}

std::string headline(const CurveSource& curve) {
  return fmt::format("{} over {} of {} tokens", plural(curve.curves.size(), "schedule"),
                     plural(curve.windows, "window"), curve.length);
}

Row source_row(const SourceName& name, const char* kind, const std::string& text) {
  return {text_cell(name.label),
          text_cell(kind),
          text_cell(text),
          {fmt::format("<code>{}</code>", escape_markup(name.path)), "muted"}};
}

std::string introduction(const Sources& sources, const ReportOptions& options) {
  HtmlTable table;
  table.head = {{{"Source"}, {"Kind"}, {"What it holds"}, {"Path"}}};
  std::vector<Row> rows;
  for (const TrainingSource& run : sources.training)
    rows.push_back(source_row(run.name, "training run", headline(run)));
  for (const ModelSource& model : sources.models) {
    rows.push_back(source_row(model.name, "model",
                              fmt::format("{} layers of width {}", model.config.layers, model.config.width)));
  }
  for (const EvaluationSource& evaluation : sources.evaluations) {
    rows.push_back(source_row(evaluation.name, "evaluation", headline(evaluation)));
  }
  for (const CurveSource& curve : sources.curves)
    rows.push_back(source_row(curve.name, "switch curves", headline(curve)));
  for (const SampleSource& file : sources.samples) {
    rows.push_back(source_row(file.name, "samples", plural(file.samples.size(), "text")));
  }
  table.groups = {{"", rows}};
  std::string html;
  if (!options.made.empty()) html += fmt::format("<p class=\"lead\">{}</p>\n", escape_markup(options.made));
  if (!options.command.empty())
    html += fmt::format("<p class=\"note\"><code>{}</code></p>\n", escape_markup(options.command));
  return html + to_html(table);
}

}  // namespace

std::string report_html(const Sources& sources, const ReportOptions& options) {
  Figures figures;
  const std::vector<Section> sections = {
      models_section(sources),        training_section(sources, figures), tasks_section(sources),
      needle_section(sources),        recall_section(sources, figures),   curves_section(sources, figures),
      cost_section(sources, figures), samples_section(sources),
  };
  return page_html(options.title, introduction(sources, options), sections);
}

}  // namespace oryx::evaluation
