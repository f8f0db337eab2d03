#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/value.h"
#include "evaluation/report/report.h"
#include "evaluation/report/section_tools.h"

namespace oryx::evaluation {

namespace {

constexpr size_t kBuckets = 400;  // points of a curve of the page

// The series of a run, x in units of tokens.
Series series_of(const std::string& name, const Points& points, double divisor, int colour, int dash,
                 size_t& per_bucket) {
  size_t bucket = 1;
  Points thin = thinned(points, kBuckets, bucket);
  per_bucket = std::max(per_bucket, bucket);
  for (double& x : thin.x) x /= divisor;
  Series series{name, std::move(thin.x), std::move(thin.y)};
  series.colour = colour;
  series.dash = dash;
  return series;
}

// Losses fall steeply at first: the range is that of what comes after the first twentieth.
void settle_range(Plot& plot) {
  double last = 0;
  for (const Series& series : plot.series) {
    for (const double x : series.x) last = std::max(last, x);
  }
  double low = INFINITY, high = -INFINITY;
  for (const Series& series : plot.series) {
    for (size_t i = 0; i < series.x.size(); ++i) {
      low = std::min(low, series.y[i]);
      if (series.x[i] >= last / 20) high = std::max(high, series.y[i]);
    }
  }
  if (low < high) plot.y_range = {low - 0.04 * (high - low), high + 0.04 * (high - low)};
}

int dash_of(const std::string& mode) { return mode == "linear" ? 1 : mode == "mixed" ? 2 : 0; }

class Curves {
 public:
  Curves(const std::vector<TrainingSource>& runs, Figures& figures) : runs_(runs), figures_(figures) {
    double tokens = 0;
    for (const TrainingSource& run : runs) tokens = std::max(tokens, run.tokens);
    unit_ = unit_for(tokens);
  }

  std::string validation() {
    Plot plot = empty("Validation loss", "nats a token");
    size_t ignored = 1;
    for (size_t i = 0; i < runs_.size(); ++i) {
      for (const auto& [mode, points] : runs_[i].validation) {
        Series series =
            series_of(label(i, mode), points, unit_.divisor, static_cast<int>(i), dash_of(mode), ignored);
        series.points = series.x.size() <= 40;
        plot.series.push_back(std::move(series));
      }
    }
    return draw(
        plot,
        "Loss on held-out sequences, each mode alone: solid for attention, dashed for the linear mixer. "
        "The steep first twentieth is cut off.",
        true);
  }

  // What the linear mode loses against attention, for runs that have both.
  std::string gap() {
    Plot plot = empty("Linear loss minus attention loss", "nats a token");
    size_t ignored = 1;
    for (size_t i = 0; i < runs_.size(); ++i) {
      const Points *attention = nullptr, *linear = nullptr;
      for (const auto& [mode, points] : runs_[i].validation) {
        if (mode == "attention") attention = &points;
        if (mode == "linear") linear = &points;
      }
      if (!attention || !linear || attention->x != linear->x) continue;
      Points difference = *linear;
      for (size_t n = 0; n < difference.y.size(); ++n) difference.y[n] -= attention->y[n];
      plot.series.push_back(series_of(runs_[i].name.label, difference, unit_.divisor, static_cast<int>(i),
                                      static_cast<int>(i), ignored));
      plot.series.back().points = difference.x.size() <= 40;
    }
    plot.baseline = 0;
    return draw(plot,
                "Validation loss of the linear mode less that of attention, at the same step on the same "
                "sequences. Below zero the recurrence predicts better.");
  }

  std::string of(const char* title, const char* unit, Points TrainingSource::*member, bool settle,
                 const char* caption) {
    Plot plot = empty(title, unit);
    size_t per_bucket = 1;
    for (size_t i = 0; i < runs_.size(); ++i) {
      if ((runs_[i].*member).x.empty()) continue;
      plot.series.push_back(series_of(runs_[i].name.label, runs_[i].*member, unit_.divisor,
                                      static_cast<int>(i), static_cast<int>(i), per_bucket));
    }
    double largest = 0;
    for (const Series& series : plot.series)
      largest = std::max(largest, *std::max_element(series.y.begin(), series.y.end()));
    const Unit scale = unit_for(largest);
    if (!scale.name.empty()) plot.y_label = fmt::format("{} {}", scale.name, unit);
    for (Series& series : plot.series) {
      for (double& y : series.y) y /= scale.divisor;
    }
    std::string text = caption;
    if (per_bucket > 1) text += fmt::format(" Each point is the mean of up to {} steps.", per_bucket);
    return draw(plot, text, settle);
  }

 private:
  Plot empty(const char* title, const char* unit) const {
    Plot plot;
    plot.title = title;
    plot.x_label = unit_.name.empty() ? "tokens" : unit_.name + " tokens";
    plot.y_label = unit;
    return plot;
  }

  std::string label(size_t run, const std::string& mode) const {
    return runs_.size() == 1 ? mode : fmt::format("{}, {}", runs_[run].name.label, mode);
  }

  std::string draw(Plot& plot, const std::string& caption, bool settle = false) {
    const bool is_empty =
        std::all_of(plot.series.begin(), plot.series.end(), [](const auto& s) { return s.x.empty(); });
    if (is_empty) return "";
    if (settle) settle_range(plot);
    return figures_.figure(plot, caption);
  }

  const std::vector<TrainingSource>& runs_;
  Figures& figures_;
  Unit unit_;
};

std::string duration_text(double seconds) {
  if (seconds >= 5400) return fmt::format("{:.1f} h", seconds / 3600);
  if (seconds >= 90) return fmt::format("{:.1f} min", seconds / 60);
  return fmt::format("{:.0f} s", seconds);
}

std::string run_table(const std::vector<TrainingSource>& runs) {
  std::vector<std::string> modes;
  for (const TrainingSource& run : runs) {
    for (const auto& [mode, points] : run.validation) {
      if (std::find(modes.begin(), modes.end(), mode) == modes.end()) modes.push_back(mode);
    }
  }
  HtmlTable table;
  Row head = {{"Run"}, {"Steps", "number"}, {"Tokens", "number"}, {"Training loss", "number"}};
  for (const std::string& mode : modes) head.push_back({escape_markup("Validation, " + mode), "number"});
  head.insert(head.end(), {{"Tokens a second", "number"}, {"Time", "number"}});
  table.head = {head};
  HtmlTable::Group group;
  for (const TrainingSource& run : runs) {
    // One step's loss is noisy: that of the last fiftieth.
    const size_t tail = std::max<size_t>(1, run.loss.y.size() / 50);
    double loss = 0;
    for (size_t i = run.loss.y.size() - std::min(tail, run.loss.y.size()); i < run.loss.y.size(); ++i)
      loss += run.loss.y[i];
    Row row = {
        text_cell(run.name.label), number_cell(fmt::format("{}", run.steps)),
        number_cell(count_text(run.tokens)),
        number_cell(run.loss.y.empty() ? "–" : fmt::format("{:.3f}", loss / static_cast<double>(tail)))};
    for (const std::string& mode : modes) {
      std::string text = "–";
      for (const auto& [name, points] : run.validation) {
        if (name == mode && !points.y.empty()) text = fmt::format("{:.4f}", points.y.back());
      }
      row.push_back(number_cell(text));
    }
    row.push_back(number_cell(grouped(median(run.tokens_per_second.y))));
    row.push_back(number_cell(duration_text(run.seconds)));
    group.rows.push_back(std::move(row));
  }
  table.groups = {group};
  table.caption =
      "At the last step; the training loss is the mean over the last 2% of the steps, under schedules drawn "
      "as the recipe "
      "says, tokens a second the median over steps. Losses in nats a token.";
  return to_html(table);
}

std::string recipe_table(const std::vector<TrainingSource>& runs) {
  std::vector<std::string> keys;
  std::vector<Table> recipes;
  for (const TrainingSource& run : runs) {
    recipes.emplace_back();
    for (const char* name : {"data", "schedule", "training", "run"}) {
      for (const Entry& entry : flatten(section(run.recipe, name)).entries) {
        const std::string key = fmt::format("{}.{}", name, entry.key);
        if (std::find(keys.begin(), keys.end(), key) == keys.end()) keys.push_back(key);
        recipes.back().set(key, entry.value);
      }
    }
  }
  if (keys.empty()) return "";
  HtmlTable table;
  Row head = {{"Key"}};
  for (const TrainingSource& run : runs) head.push_back({escape_markup(run.name.label), "number"});
  table.head = {head};
  HtmlTable::Group group;
  for (const std::string& key : keys) {
    Row row = {{fmt::format("<code>{}</code>", escape_markup(key))}};
    for (const Table& recipe : recipes) {
      const Value* value = recipe.find(key);
      const std::string* text = value ? value->as<std::string>() : nullptr;
      row.push_back(number_cell(escape_markup(text ? *text : value ? value->text() : "–")));
    }
    group.rows.push_back(std::move(row));
  }
  table.groups = {group};
  return "<details><summary>Recipes in full</summary>" + to_html(table) + "</details>\n";
}

}  // namespace

Section training_section(const Sources& sources, Figures& figures) {
  Section section{"training", "Training", ""};
  if (sources.training.empty()) return section;
  Curves curves(sources.training, figures);
  section.html = run_table(sources.training) + "<div class=\"plots\">\n";
  section.html += curves.validation();
  section.html += curves.gap();
  section.html += curves.of("Training loss", "nats a token", &TrainingSource::loss, true,
                            "Mean over the tokens of a step, under the schedules drawn for it.");
  section.html += curves.of("Learning rate", "rate", &TrainingSource::learning_rate, false, "Of each step.");
  section.html += curves.of("Gradient norm", "global norm before clipping", &TrainingSource::gradient_norm,
                            true, "Over all parameters.");
  section.html += curves.of("Speed", "tokens a second", &TrainingSource::tokens_per_second, false,
                            "Of the step alone, without validation and checkpoints.");
  section.html += "</div>\n" + recipe_table(sources.training);
  return section;
}

}  // namespace oryx::evaluation
