#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "evaluation/report/report.h"
#include "evaluation/report/section_tools.h"

namespace oryx::evaluation {

namespace {

std::string heatmap_html(const std::string& label, const std::string& schedule, const TaskScore& task,
                         ItemRange& samples) {
  std::set<int64_t> lengths;
  std::set<double> depths;
  for (const NeedleCell& cell : task.cells) {
    lengths.insert(cell.length);
    depths.insert(cell.depth);
    samples.add(cell.items);
  }
  // Fractions, or per cent already.
  const double factor = *depths.rbegin() <= 1 ? 100 : 1;
  Heatmap map;
  map.title = fmt::format("{}, {}: {}", task_title(task.task), label, schedule);
  map.x_label = "context, tokens";
  map.y_label = "depth";
  for (const int64_t length : lengths) map.columns.push_back(fmt::format("{}", length));
  for (const double depth : depths) map.rows.push_back(fmt::format("{:.0f}%", depth * factor));
  map.values.assign(depths.size(), std::vector<double>(lengths.size(), NAN));
  for (const NeedleCell& cell : task.cells) {
    const auto row = std::distance(depths.begin(), depths.find(cell.depth));
    const auto column = std::distance(lengths.begin(), lengths.find(cell.length));
    map.values[row][column] = cell.value;
  }
  return fmt::format("<figure class=\"heatmap\"><h4>{}<br><code>{}</code></h4>{}</figure>\n",
                     escape_markup(label), escape_markup(schedule), to_page_svg(map));
}

// A mode throughout, or one for the haystack and another for the question; the rest of a sweep is folded
// away.
bool is_plain(const std::string& schedule) {
  const bool is_form = schedule.starts_with("every(") || schedule.starts_with("random(");
  return !is_form && std::count(schedule.begin(), schedule.end(), ',') < 2;
}

std::string task_html(const Sources& sources, const std::string& name) {
  ItemRange samples;
  std::string plain, others;
  int folded = 0;
  for (const EvaluationSource& evaluation : sources.evaluations) {
    for (const ScheduleScores& run : evaluation.runs) {
      const TaskScore* task = run.task(name);
      if (!task || task->cells.empty()) continue;
      const std::string map =
          heatmap_html(evaluation_label(evaluation, sources), run.schedule, *task, samples);
      (is_plain(run.schedule) ? plain : others) += map;
      folded += !is_plain(run.schedule);
    }
  }
  std::string html = fmt::format("<h3>{}</h3>\n<div class=\"heatmaps\">\n{}</div>\n",
                                 escape_markup(task_title(name)), plain.empty() ? others : plain);
  html += fmt::format(
      "<p class=\"note\">Per cent of answers that contain the needle’s value, {} samples a cell. Columns: "
      "length of the "
      "context; rows: depth of the needle, from the start (0%) to the end.</p>\n",
      samples.text());
  if (!plain.empty() && folded > 0) {
    html += fmt::format(
        "<details><summary>{} more schedules of the sweep</summary><div "
        "class=\"heatmaps\">\n{}</div></details>\n",
        folded, others);
  }
  return html;
}

}  // namespace

Section needle_section(const Sources& sources) {
  Section section{"needles", "Needles by length and depth", ""};
  std::set<std::string> tasks;
  for (const EvaluationSource& evaluation : sources.evaluations) {
    for (const ScheduleScores& run : evaluation.runs) {
      for (const TaskScore& task : run.tasks) {
        if (!task.cells.empty()) tasks.insert(task.task);
      }
    }
  }
  for (const std::string& name : tasks) section.html += task_html(sources, name);
  return section;
}

}  // namespace oryx::evaluation
