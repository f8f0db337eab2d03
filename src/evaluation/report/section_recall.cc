#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "evaluation/report/report.h"
#include "evaluation/report/section_tools.h"

namespace oryx::evaluation {

namespace {

// What one figure compares: a task at one length of its sequences.
struct Recall {
  Plot plot;
  ItemRange items;
};

// One line a model and schedule; models by colour, schedules of a model by dash.
void add_line(const std::string& label, int model, int schedule, std::vector<RecallCell> cells,
              Recall& recall) {
  std::sort(cells.begin(), cells.end(), [](const auto& a, const auto& b) { return a.pairs < b.pairs; });
  Series series{label, {}, {}};
  for (const RecallCell& cell : cells) {
    series.x.push_back(static_cast<double>(cell.pairs));
    series.y.push_back(100 * cell.value);
    recall.items.add(cell.items);
  }
  series.colour = model;
  series.dash = schedule;
  series.points = true;
  recall.plot.series.push_back(std::move(series));
}

}  // namespace

Section recall_section(const Sources& sources, Figures& figures) {
  Section section{"recall", "Associative recall by number of pairs", ""};
  std::map<std::pair<std::string, int64_t>, Recall> recalls;
  for (size_t model = 0; model < sources.evaluations.size(); ++model) {
    const EvaluationSource& evaluation = sources.evaluations[model];
    for (size_t n = 0; n < evaluation.runs.size(); ++n) {
      const ScheduleScores& run = evaluation.runs[n];
      for (const TaskScore& task : run.tasks) {
        std::map<int64_t, std::vector<RecallCell>> by_length;
        for (const RecallCell& cell : task.recall) by_length[cell.length].push_back(cell);
        for (const auto& [length, cells] : by_length) {
          add_line(fmt::format("{}: {}", evaluation_label(evaluation, sources), run.schedule),
                   static_cast<int>(model), static_cast<int>(n), cells, recalls[{task.task, length}]);
        }
      }
    }
  }
  for (auto& [key, recall] : recalls) {
    const auto& [task, length] = key;
    recall.plot.title = fmt::format("{}, sequences of {} tokens", task_title(task), length);
    recall.plot.x_label = "pairs of a key and a value";
    recall.plot.y_label = "values that are right, %";
    recall.plot.binary_x = true;
    // A little more than 0 to 100, so that points at the ends are whole.
    recall.plot.y_range = {-3, 103};
    section.html += figures.figure(
        recall.plot,
        fmt::format("Means over {} sequences for each number of pairs. One colour a model, one "
                    "kind of line a schedule.",
                    recall.items.text()),
        FigureSize::full);
  }
  return section;
}

}  // namespace oryx::evaluation
