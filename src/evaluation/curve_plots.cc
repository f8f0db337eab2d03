#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <utility>

#include "evaluation/curve.h"

namespace oryx::evaluation {

namespace {

using schedule::Mode;

constexpr size_t kMostMarkers = 12;          // more vertical lines than this hide the curves
constexpr size_t kMostTogether = 4;          // more switched curves than this hide each other
constexpr int kReferenceColours[] = {0, 1};  // of attention and linear, in every plot
constexpr int kFirstColour = 2;

// A text's first tokens are far harder than all others: the range is that of the rest.
std::pair<double, double> range_of(const std::vector<CurveLine>& lines, int64_t length, int64_t smooth) {
  const int64_t settled = std::min(length - 1, std::max(smooth / 2, length / 32));
  double low = INFINITY, high = 0;
  for (const CurveLine& line : lines) {
    const std::vector<double>& values = line.curve.perplexity;
    low = std::min(low, *std::min_element(values.begin(), values.end()));
    high = std::max(high, *std::max_element(values.begin() + settled, values.end()));
    // Bands of few windows may be far wider than the curves differ: they may leave the picture, but not the
    // curves.
  }
  return {low * 0.98, high * 1.02};
}

std::string title_of(const std::vector<const CurveLine*>& group, bool together) {
  if (together) return "Perplexity by position";
  const CurveLine& line = *group[0];
  if (line.switches.size() > 1) {
    return fmt::format("Several switches, {} first", schedule::mode_name(line.first));
  }
  return fmt::format("One switch, {} to {}", schedule::mode_name(line.first), schedule::mode_name(line.last));
}

Plot plot_of(const std::vector<const CurveLine*>& references, const std::vector<const CurveLine*>& switched,
             int64_t length, int64_t smooth) {
  Plot plot;
  plot.x_label = "position";
  plot.y_label = fmt::format("perplexity, loss averaged over {} positions", smooth);
  plot.logarithmic_y = true;
  std::set<int64_t> switches;
  std::vector<double> positions(length);
  for (int64_t i = 0; i < length; ++i) positions[i] = static_cast<double>(i);
  for (const CurveLine* line : references) {
    Series series{line->schedule, positions, line->curve.perplexity, true, line->curve.low, line->curve.high};
    series.colour = kReferenceColours[static_cast<size_t>(line->first)];
    plot.series.push_back(std::move(series));
  }
  int next = 0;
  for (const CurveLine* line : switched) {
    Series series{line->schedule, positions, line->curve.perplexity};
    series.colour = kFirstColour + next % (kPaletteSize - kFirstColour);
    series.dash = next++;
    plot.series.push_back(std::move(series));
    switches.insert(line->switches.begin(), line->switches.end());
  }
  if (switches.size() <= kMostMarkers) {
    for (const int64_t position : switches) {
      plot.markers.push_back({static_cast<double>(position), fmt::format("{}", position)});
    }
  }
  return plot;
}

}  // namespace

std::vector<Plot> curve_plots(const std::vector<CurveLine>& lines, int64_t windows, int64_t length,
                              int64_t smooth) {
  std::vector<const CurveLine*> references;
  std::map<std::pair<bool, bool>, std::vector<const CurveLine*>>
      groups;  // by several switches, attention first
  size_t switched = 0;
  for (const CurveLine& line : lines) switched += !line.is_reference;
  const bool together = switched <= kMostTogether;
  for (const CurveLine& line : lines) {
    if (line.is_reference) {
      references.push_back(&line);
      continue;
    }
    const std::pair key{line.switches.size() > 1, line.first == Mode::attention};
    groups[together ? std::pair{false, false} : key].push_back(&line);
  }
  if (groups.empty()) groups[{false, false}] = {};
  const std::pair<double, double> range = range_of(lines, length, smooth);
  std::vector<Plot> plots;
  for (const auto& [key, group] : groups) {
    Plot plot = plot_of(references, group, length, smooth);
    plot.title = fmt::format("{}, {} windows of {} tokens", title_of(group, together), windows, length);
    plot.y_range = range;
    plots.push_back(std::move(plot));
  }
  return plots;
}

std::vector<Plot> curve_plots(const std::vector<Curve>& curves, int64_t smooth) {
  std::vector<CurveLine> lines;
  for (const Curve& curve : curves) {
    CurveLine line{curve.schedule,      curve.is_reference,      {},
                   curve.modes[0].mode, curve.modes.back().mode, smoothed(curve, smooth)};
    for (size_t i = 1; i < curve.modes.size(); ++i) line.switches.push_back(curve.modes[i].begin);
    lines.push_back(std::move(line));
  }
  return curve_plots(lines, curves[0].loss.size(0), curves[0].loss.size(1), smooth);
}

}  // namespace oryx::evaluation
