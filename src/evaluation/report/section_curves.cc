#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "evaluation/report/report.h"
#include "evaluation/report/section_tools.h"

namespace oryx::evaluation {

namespace {

std::vector<Plot> plots_of(const CurveSource& source) {
  std::vector<CurveLine> lines;
  for (const CurveSchedule& curve : source.curves) lines.push_back(curve.line);
  std::vector<Plot> plots = curve_plots(lines, source.windows, source.length, source.smooth);
  for (Plot& plot : plots) plot.y_label = "perplexity";  // the text says how it is smoothed
  return plots;
}

// What all curves of a directory have in common.
std::string how_measured(const CurveSource& source) {
  const bool has_bands = !source.curves[0].line.curve.low.empty();
  return fmt::format(
      "{} of {} tokens; each window’s loss is smoothed by a centred moving average over {} positions (fewer "
      "at the ends), "
      "averaged, exponentiated. Broad lines: one mode throughout{}.",
      plural(source.windows, "window"), source.length, source.smooth,
      has_bands ? ", with their 95% confidence band over windows, which is mostly how texts differ; what a "
                  "switch costs on "
                  "the same texts is below"
                : "");
}

// Loss beyond the target mode's curve by tokens after the switch, one line a switch of single-switch
// schedules.
Plot excess_plot(const CurveSource& source, const std::string& to) {
  Plot plot;
  plot.title = to == "attention" ? "After a switch to attention" : "After a switch to the linear mixer";
  plot.x_label = "tokens after the switch";
  plot.y_label = "excess loss, nats a token";
  plot.baseline = 0;
  const double factor = source.windows > 1 ? confidence_factor(source.windows) : 0;
  std::vector<const SwitchRow*> switches;
  for (const CurveSchedule& curve : source.curves) {
    if (curve.switches.size() == 1 && curve.switches[0].to == to && !curve.switches[0].bins.empty())
      switches.push_back(&curve.switches[0]);
  }
  std::sort(switches.begin(), switches.end(),
            [](const auto* a, const auto* b) { return a->position < b->position; });
  int number = 0;
  for (const SwitchRow* change : switches) {
    Series series{fmt::format("at {}", change->position), {}, {}};
    for (const ExcessRow& bin : change->bins) {
      series.x.push_back(static_cast<double>(bin.begin + bin.end) / 2);
      series.y.push_back(bin.mean);
      if (source.windows < 2) continue;
      series.low.push_back(bin.mean - factor * bin.standard_error);
      series.high.push_back(bin.mean + factor * bin.standard_error);
    }
    series.colour = number;
    series.dash = number++;
    plot.series.push_back(std::move(series));
  }
  return plot;
}

std::string excess_figures(const CurveSource& source, Figures& figures) {
  std::vector<Plot> plots;
  double low = INFINITY, high = -INFINITY;
  for (const char* to : {"attention", "linear"}) {
    Plot plot = excess_plot(source, to);
    if (plot.series.empty()) continue;
    const Axis axis = plot_axes(plot).second;
    low = std::min(low, axis.low());
    high = std::max(high, axis.high());
    plots.push_back(std::move(plot));
  }
  std::string html;
  for (Plot& plot : plots) {
    // One scale for both directions: which of them costs more is the question.
    plot.y_range = {low, high};
    html += figures.figure(
        plot,
        fmt::format(
            "Means of {} tokens over {} windows of the loss less that of the unswitched curve on the same "
            "text. Bands: 95% confidence intervals, paired over windows.",
            kExcessBin, source.windows));
  }
  return html;
}

// A long schedule may be broken after its commas.
std::string breakable(const std::string& schedule) {
  std::string html;
  for (const char c : escape_markup(schedule)) {
    html += c;
    if (c == ',') html += "<wbr>";
  }
  return html;
}

std::string excess_table(const CurveSource& source) {
  // The first four are of the same numbers of tokens everywhere; what follows them depends on the room.
  constexpr int64_t kEnds[] = {16, 64, 128, 256};
  const double factor = source.windows > 1 ? confidence_factor(source.windows) : 0;
  const auto cell_of = [&](const ExcessRow* row) {
    if (!row) return number_cell("–");
    const bool is_clear = source.windows > 1 && std::abs(row->mean) > factor * row->standard_error;
    Cell cell = number_cell(fmt::format("{:+.4f} <small>± {:.4f}</small>", row->mean, row->standard_error));
    if (!is_clear) cell.css += " muted";
    return cell;
  };
  HtmlTable table;
  Row head = {{"Schedule"}, {"Perplexity", "number"}, {"Switch"}};
  for (const int64_t end : kEnds) head.push_back({fmt::format("0–{}", end), "number"});
  head.push_back({"beyond", "number"});
  table.head = {head};
  HtmlTable::Group group;
  for (const CurveSchedule& curve : source.curves) {
    Row first = {{fmt::format("<code>{}</code>", breakable(curve.line.schedule))},
                 number_cell(fmt::format("{:.3f}", curve.perplexity))};
    if (curve.switches.empty()) {
      first.push_back({"none", "muted"});
      for (size_t i = 0; i < std::size(kEnds) + 1; ++i) first.push_back(number_cell(""));
      group.rows.push_back(std::move(first));
      continue;
    }
    for (size_t n = 0; n < curve.switches.size(); ++n) {
      const SwitchRow& change = curve.switches[n];
      Row row = n == 0 ? first : Row{{""}, {""}};
      row.push_back({escape_markup(fmt::format("{} to {}", change.position, change.to)), "nowrap"});
      for (const int64_t end : kEnds) {
        const auto found = std::find_if(change.excess.begin(), change.excess.end(),
                                        [&](const ExcessRow& e) { return e.begin == 0 && e.end == end; });
        row.push_back(cell_of(found == change.excess.end() ? nullptr : &*found));
      }
      const auto rest = std::find_if(change.excess.begin(), change.excess.end(),
                                     [](const ExcessRow& e) { return e.begin > 0; });
      row.push_back(cell_of(rest == change.excess.end() ? nullptr : &*rest));
      group.rows.push_back(std::move(row));
    }
  }
  table.groups = {group};
  table.css = "wrap";
  table.caption = fmt::format(
      "Loss in nats a token beyond the unswitched curve of the mode switched to, over the first 16, 64, 128 "
      "and 256 "
      "tokens after the switch and over all beyond them, as far as they lie before the next switch. ± one "
      "standard error, "
      "paired over {} windows; grey: zero lies in the 95% interval.",
      source.windows);
  return to_html(table);
}

}  // namespace

Section curves_section(const Sources& sources, Figures& figures) {
  Section section{"curves", "Switch curves", ""};
  for (const CurveSource& source : sources.curves) {
    section.html += fmt::format(
        "<h3>{}</h3>\n<p>Model <code>{}</code>, text <code>{}</code>{}.</p>\n<div class=\"plots\">\n",
        escape_markup(source.name.label), escape_markup(source.model), escape_markup(source.data),
        source.dtype.empty() ? "" : ", computed in " + escape_markup(source.dtype));
    const std::vector<Plot> plots = plots_of(source);
    const bool one = plots.size() == 1;
    for (const Plot& plot : plots) {
      section.html +=
          figures.figure(plot, one ? how_measured(source) : "", one ? FigureSize::full : FigureSize::half);
    }
    if (!one) section.html += fmt::format("<p class=\"note full\">{}</p>\n", how_measured(source));
    section.html += excess_figures(source, figures) + "</div>\n" + excess_table(source);
  }
  return section;
}

}  // namespace oryx::evaluation
