#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "evaluation/report/report.h"
#include "evaluation/report/section_tools.h"

namespace oryx::evaluation {

namespace {

enum class Family { single, every, random, ends_in_attention, begins_with_attention, other };

struct FamilyName {
  Family family;
  const char* name;
};
constexpr FamilyName kFamilies[] = {
    {Family::single, "one mode"},
    {Family::every, "every(N)"},
    {Family::random, "random(P)"},
    {Family::ends_in_attention, "attention last"},
    {Family::begins_with_attention, "attention first"},
    {Family::other, "other"},
};

Family family_of(const std::string& schedule) {
  if (schedule == "attention" || schedule == "linear") return Family::single;
  if (schedule.starts_with("every(")) return Family::every;
  if (schedule.starts_with("random(")) return Family::random;
  const bool two_spans =
      std::count(schedule.begin(), schedule.end(), ',') == 1 || schedule.find("->") != std::string::npos;
  if (two_spans && schedule.starts_with("linear")) return Family::ends_in_attention;
  if (two_spans && schedule.starts_with("attention")) return Family::begins_with_attention;
  return Family::other;
}

// A point's name beside it: the part that tells it from others of its family.
std::string short_name(const std::string& schedule) {
  switch (family_of(schedule)) {
    case Family::every:
    case Family::random: {
      const size_t open = schedule.find('('), close = schedule.find_first_of(",)", open);
      return schedule.substr(open + 1, close - open - 1);
    }
    case Family::ends_in_attention:
    case Family::begins_with_attention: {
      const size_t at = schedule.rfind('@');
      return at == std::string::npos ? schedule : schedule.substr(at);
    }
    default:
      return schedule;
  }
}

// What a run cost, over some of its tasks.
struct Cost {
  double tokens = 0, attention_tokens = 0, flops = 0, seconds = 0, tokens_run = 0, state_bytes = 0, items = 0;

  void add(const TaskScore& task) {
    tokens += task.tokens;
    attention_tokens += task.attention_tokens;
    flops += task.flops;
    seconds += task.seconds;
    tokens_run += task.tokens_per_second * task.seconds;
    state_bytes += task.state_bytes * static_cast<double>(task.items);
    items += static_cast<double>(task.items);
  }
  double share() const { return tokens > 0 ? attention_tokens / tokens : 0; }
  double flops_per_token() const { return tokens > 0 ? flops / tokens : 0; }
};

// Something to plot: an average or one task, a quality for each run that has it and what that cost.
struct Measure {
  std::string title, y_label;
  bool is_loss = false;
  std::map<const ScheduleScores*, std::pair<double, Cost>> values;
};

void add_accuracies(const Sources& sources, std::vector<Measure>& measures) {
  constexpr std::pair<const char*, const char*> kGroups[] = {{"language", "Language tasks, average"},
                                                             {"retrieval", "Retrieval, average"},
                                                             {"needle", "Needles, average"}};
  std::set<std::string> averaged;
  for (const auto& [group, title] : kGroups) {
    Measure measure{title, "accuracy, %", false, {}};
    for (const EvaluationSource& evaluation : sources.evaluations) {
      for (const ScheduleScores& run : evaluation.runs) {
        const auto average = run.averages.find(group);
        if (average == run.averages.end()) continue;
        Cost cost;
        for (const TaskScore& task : run.tasks) {
          if (task.group == group) cost.add(task);
        }
        measure.values[&run] = {100 * average->second, cost};
      }
    }
    if (measure.values.size() > 1) {
      averaged.insert(group);
      measures.push_back(std::move(measure));
    }
  }
  // Tasks of groups that have no average yet, one by one.
  std::map<std::string, Measure> single;
  for (const EvaluationSource& evaluation : sources.evaluations) {
    for (const ScheduleScores& run : evaluation.runs) {
      for (const TaskScore& task : run.tasks) {
        const MetricValue* metric = task.metric(task.main);
        if (averaged.contains(task.group) || is_loss(task.main) || !metric->value) continue;
        Measure& measure = single[task.task];
        measure.title = task_title(task.task);
        measure.y_label = task.main + ", %";
        Cost cost;
        cost.add(task);
        measure.values[&run] = {100 * *metric->value, cost};
      }
    }
  }
  for (auto& [task, measure] : single) {
    if (measure.values.size() > 1) measures.push_back(std::move(measure));
  }
}

// Perplexities as the losses they come from.
void add_losses(const Sources& sources, std::vector<Measure>& measures) {
  std::map<std::string, Measure> found;
  for (const EvaluationSource& evaluation : sources.evaluations) {
    for (const ScheduleScores& run : evaluation.runs) {
      for (const TaskScore& task : run.tasks) {
        for (const MetricValue& metric : task.metrics) {
          const bool is_perplexity =
              metric.name == "ppl" || metric.name.find("word_perplexity") != std::string::npos;
          if (!is_perplexity || !metric.value || *metric.value <= 0) continue;
          Measure& measure = found[task.task];
          measure.title = fmt::format("{}, loss", task_title(task.task));
          measure.y_label =
              metric.name == "ppl" ? "ln ppl, nats a target" : "ln word perplexity, nats a word";
          measure.is_loss = true;
          Cost cost;
          cost.add(task);
          measure.values[&run] = {std::log(*metric.value), cost};
        }
      }
    }
  }
  for (auto& [task, measure] : found) {
    if (measure.values.size() > 1) measures.push_back(std::move(measure));
  }
}

Plot plot_of(const Measure& measure, const Sources& sources) {
  Plot plot;
  plot.title =
      fmt::format("{} against {}", measure.title, measure.is_loss ? "operations" : "attention’s share");
  plot.x_label = measure.is_loss ? "MFLOP a token" : "tokens that attention processed, %";
  plot.y_label = measure.y_label;
  const auto sweeps = std::count_if(sources.evaluations.begin(), sources.evaluations.end(),
                                    [](const EvaluationSource& e) { return e.runs.size() > 2; });
  for (size_t e = 0; e < sources.evaluations.size(); ++e) {
    const EvaluationSource& evaluation = sources.evaluations[e];
    for (const FamilyName& family : kFamilies) {
      std::vector<std::tuple<double, double, std::string>> points;
      for (const ScheduleScores& run : evaluation.runs) {
        const auto value = measure.values.find(&run);
        if (value == measure.values.end() || family_of(run.schedule) != family.family) continue;
        const Cost& cost = value->second.second;
        const double x = measure.is_loss ? cost.flops_per_token() * 1e-6 : 100 * cost.share();
        points.emplace_back(x, value->second.first, short_name(run.schedule));
      }
      if (points.empty()) continue;
      std::sort(points.begin(), points.end());
      const std::string label = evaluation_label(evaluation, sources);
      Series series{
          sources.evaluations.size() > 1 ? fmt::format("{}, {}", label, family.name) : family.name, {}, {}};
      for (const auto& [x, y, name] : points) {
        series.x.push_back(x);
        series.y.push_back(y);
        series.labels.push_back(name);
      }
      const int shape = static_cast<int>(family.family);
      // By model where several were swept, which their shapes alone would not tell apart.
      series.colour = sweeps > 1 ? static_cast<int>(e) : static_cast<int>(plot.series.size());
      series.dash = shape;
      series.points = true;
      series.line = family.family != Family::single && family.family != Family::other && points.size() > 1;
      plot.series.push_back(std::move(series));
    }
  }
  // Points at the edge would be cut in half.
  const auto [x_axis, y_axis] = plot_axes(plot);
  const double margin = 0.08 * (y_axis.high() - y_axis.low());
  plot.y_range = {y_axis.low() - margin, y_axis.high() + margin};
  const double side = 0.03 * (x_axis.high() - x_axis.low());
  plot.x_range = {x_axis.low() - side, x_axis.high() + side};
  return plot;
}

std::string caption_of(const Measure& measure) {
  double fewest = INFINITY, most = 0;
  for (const auto& [run, value] : measure.values) {
    fewest = std::min(fewest, value.second.items);
    most = std::max(most, value.second.items);
  }
  const std::string items =
      fewest == most ? grouped(most) : fmt::format("{} to {}", grouped(fewest), grouped(most));
  return fmt::format("{} of the task’s sequences{}; a point is a schedule, measured on {} items.",
                     measure.is_loss ? "Operations" : "Tokens", measure.is_loss ? " by the cost model" : "",
                     items);
}

std::string cost_table(const Sources& sources) {
  HtmlTable table;
  table.head = {{{"Schedule"},
                 {"Attention’s share", "number"},
                 {"MFLOP a token", "number"},
                 {"State of a sequence", "number"},
                 {"Tokens a second", "number"},
                 {"Time", "number"},
                 {"Language average, %", "number"},
                 {"WikiText word ppl ↓", "number"}}};
  for (const EvaluationSource& evaluation : sources.evaluations) {
    HtmlTable::Group group{
        fmt::format("{} <small>{}, {}</small>", escape_markup(evaluation_label(evaluation, sources)),
                    escape_markup(evaluation.device), escape_markup(evaluation.dtype)),
        {}};
    for (const ScheduleScores& run : evaluation.runs) {
      Cost cost;
      for (const TaskScore& task : run.tasks) cost.add(task);
      if (cost.tokens <= 0) continue;
      const auto average = run.averages.find("language");
      const TaskScore* wikitext = run.task("wikitext");
      const MetricValue* perplexity = wikitext ? wikitext->metric("word_perplexity") : nullptr;
      group.rows.push_back(
          {{fmt::format("<code>{}</code>", escape_markup(run.schedule))},
           number_cell(fmt::format("{:.1f}%", 100 * cost.share())),
           number_cell(fmt::format("{:.2f}", cost.flops_per_token() * 1e-6)),
           number_cell(bytes_text(cost.items > 0 ? cost.state_bytes / cost.items : 0)),
           number_cell(cost.seconds > 0 ? grouped(cost.tokens_run / cost.seconds) : "–"),
           number_cell(fmt::format("{:.0f} s", cost.seconds)),
           number_cell(average == run.averages.end() ? "–" : metric_text("acc", average->second)),
           number_cell(perplexity && perplexity->value ? metric_text("ppl", *perplexity->value) : "–")});
    }
    if (!group.rows.empty()) table.groups.push_back(std::move(group));
  }
  if (table.groups.empty()) return "";
  table.caption =
      "Over all tasks of a schedule, so compare schedules of the same tasks. Operations by the cost model, "
      "each sequence "
      "counted whole; state: keys, values, recurrence and convolution tails of a sequence of mean length; "
      "tokens a second "
      "as measured, contexts that several choices share counted once.";
  return to_html(table);
}

}  // namespace

Section cost_section(const Sources& sources, Figures& figures) {
  Section section{"cost", "Cost beside quality", ""};
  const std::string table = cost_table(sources);
  if (table.empty()) return section;
  std::vector<Measure> measures;
  add_accuracies(sources, measures);
  add_losses(sources, measures);
  std::string plots;
  for (const Measure& measure : measures) {
    plots += figures.figure(plot_of(measure, sources), caption_of(measure));
  }
  if (!plots.empty()) section.html += "<div class=\"plots\">\n" + plots + "</div>\n";
  section.html += table;
  return section;
}

}  // namespace oryx::evaluation
