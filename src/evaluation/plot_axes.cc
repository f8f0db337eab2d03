#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include "base/error.h"
#include "evaluation/plot.h"

namespace oryx::evaluation {

namespace {

// Multiples of the smallest round step (1, 2 or 5 times a power of ten) that gives at most `count` ticks.
std::vector<double> even_ticks(double low, double high, int count) {
  const double rough = (high - low) / std::max(1, count);
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  for (const double factor : {1.0, 2.0, 5.0, 10.0, 20.0, 50.0}) {
    const double step = power * factor;
    const auto first = static_cast<int64_t>(std::ceil(low / step - 1e-9));
    const auto last = static_cast<int64_t>(std::floor(high / step + 1e-9));
    if (last - first + 1 > count) continue;
    std::vector<double> ticks;
    for (int64_t i = first; i <= last; ++i) ticks.push_back(static_cast<double>(i) * step);
    return ticks;
  }
  return {};
}

// The finest of a few sets of round numbers within each decade that fits.
std::vector<double> logarithmic_ticks(double low, double high, int count) {
  const std::vector<std::vector<double>> sets = {
      {1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9}, {1, 2, 3, 5, 7}, {1, 2, 5}, {1, 3}, {1}};
  for (const std::vector<double>& set : sets) {
    std::vector<double> ticks;
    for (double decade = std::floor(std::log10(low)); decade <= std::log10(high); ++decade) {
      for (const double factor : set) {
        const double value = factor * std::pow(10.0, decade);
        if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) ticks.push_back(value);
      }
    }
    if (static_cast<int>(ticks.size()) <= count) {
      // Less than a decade may hold hardly any of them.
      return ticks.size() >= 4 ? ticks : even_ticks(low, high, count);
    }
  }
  return even_ticks(low, high, count);
}

// Every power of two, or as many of them left out between two as it takes.
std::vector<double> binary_ticks(double low, double high, int count) {
  const auto first = static_cast<int>(std::ceil(std::log2(low) - 1e-9));
  const auto last = static_cast<int>(std::floor(std::log2(high) + 1e-9));
  const int step = std::max(1, (last - first + count) / std::max(1, count));
  std::vector<double> ticks;
  for (int power = first; power <= last; power += step) ticks.push_back(std::exp2(power));
  return ticks.empty() ? even_ticks(low, high, count) : ticks;
}

}  // namespace

Axis::Axis(double low, double high, Scale scale) : low_(low), high_(high), scale_(scale) {
  expect(std::isfinite(low) && std::isfinite(high) && low <= high && (scale == Scale::linear || low > 0),
         "an axis from {} to {} cannot be drawn", low, high);
  if (high_ - low_ <= 1e-12 * std::max(std::abs(low_), std::abs(high_))) {
    const double margin = low_ == 0 ? 1 : 0.05 * std::abs(low_);
    low_ -= margin;
    high_ += margin;
  }
}

double Axis::place(double value) const {
  if (scale_ != Scale::linear) return std::log(value / low_) / std::log(high_ / low_);
  return (value - low_) / (high_ - low_);
}

std::vector<double> Axis::ticks(int count) const {
  switch (scale_) {
    case Scale::logarithmic:
      return logarithmic_ticks(low_, high_, count);
    case Scale::binary:
      return binary_ticks(low_, high_, count);
    case Scale::linear:
      break;
  }
  return even_ticks(low_, high_, count);
}

std::string tick_text(double value) {
  // Sums of steps such as 0.1 end in noise that four digits hide; large whole numbers keep all of theirs.
  if (std::abs(value) >= 1e3 && std::abs(value) < 1e7) return fmt::format("{:.0f}", value);
  return fmt::format("{:.4g}", value);
}

std::pair<Axis, Axis> plot_axes(const Plot& plot) {
  const double infinity = std::numeric_limits<double>::infinity();
  double low_x = infinity, high_x = -infinity, low_y = infinity, high_y = -infinity;
  for (const Series& series : plot.series) {
    expect(series.x.size() == series.y.size(), "series '{}' has {} places and {} values", series.name,
           series.x.size(), series.y.size());
    for (const std::vector<double>* band : {&series.low, &series.high}) {
      expect(band->empty() || band->size() == series.y.size(), "series '{}' has {} values and a band of {}",
             series.name, series.y.size(), band->size());
    }
    for (size_t i = 0; i < series.x.size(); ++i) {
      if (!std::isfinite(series.y[i]) || (plot.logarithmic_y && series.y[i] <= 0)) continue;
      low_x = std::min(low_x, series.x[i]);
      high_x = std::max(high_x, series.x[i]);
      low_y = std::min(low_y, series.y[i]);
      high_y = std::max(high_y, series.y[i]);
      if (series.low.empty() || series.high.empty()) continue;
      if (std::isfinite(series.low[i]) && (!plot.logarithmic_y || series.low[i] > 0))
        low_y = std::min(low_y, series.low[i]);
      if (std::isfinite(series.high[i])) high_y = std::max(high_y, series.high[i]);
    }
  }
  expect(low_x <= high_x, "plot '{}' has no finite value to show", plot.title);
  if (plot.baseline) {
    low_y = std::min(low_y, *plot.baseline);
    high_y = std::max(high_y, *plot.baseline);
  }
  if (plot.x_range) std::tie(low_x, high_x) = *plot.x_range;
  if (plot.y_range) std::tie(low_y, high_y) = *plot.y_range;
  return {Axis(low_x, high_x, plot.binary_x ? Scale::binary : Scale::linear),
          Axis(low_y, high_y, plot.logarithmic_y ? Scale::logarithmic : Scale::linear)};
}

}  // namespace oryx::evaluation
