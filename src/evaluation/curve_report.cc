#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"
#include "evaluation/curve.h"

namespace oryx::evaluation {

namespace {

using schedule::Mode;

constexpr int64_t kExcessTokens[] = {16, 64, 128, 256};
constexpr int64_t kBinnedTokens = 512;

std::vector<double> to_vector(const at::Tensor& values) {
  const at::Tensor contiguous = values.contiguous();
  const double* data = contiguous.const_data_ptr<double>();
  return {data, data + contiguous.numel()};
}

Excess excess_over(const at::Tensor& difference, int64_t position, int64_t begin, int64_t end) {
  const at::Tensor by_window = difference.slice(1, position + begin, position + end).mean(1);
  Excess excess{begin, end, by_window.mean().item<double>(), 0};
  const int64_t windows = by_window.size(0);
  if (windows > 1)
    excess.standard_error = by_window.std().item<double>() / std::sqrt(static_cast<double>(windows));
  return excess;
}

Array numbers(const std::vector<double>& values) {
  Array array;
  for (const double value : values) array.push_back(Value{value});
  return array;
}

Array excess_rows(const std::vector<Excess>& list) {
  Array rows;
  for (const Excess& excess : list) {
    Table row;
    row.set("begin", Value{excess.begin});
    row.set("end", Value{excess.end});
    row.set("excess_loss", Value{excess.mean});
    row.set("standard_error", Value{excess.standard_error});
    rows.push_back(Value{std::move(row)});
  }
  return rows;
}

Table switch_table(const SwitchReport& report) {
  Table table;
  table.set("position", Value{report.position});
  table.set("from", Value{std::string(schedule::mode_name(report.from))});
  table.set("to", Value{std::string(schedule::mode_name(report.to))});
  table.set("excess", Value{excess_rows(report.excess)});
  table.set("bins", Value{excess_rows(report.bins)});
  return table;
}

Table curve_row(const Curve& curve, const std::vector<Curve>& curves, int64_t smooth) {
  const Excess whole = excess_over(curve.loss, 0, 0, curve.loss.size(1));  // over nothing: the loss itself
  const SmoothedCurve line = smoothed(curve, smooth);
  Table row;
  row.set("schedule", Value{curve.schedule});
  row.set("reference", Value{curve.is_reference});
  row.set("mean_loss", Value{whole.mean});
  row.set("standard_error", Value{whole.standard_error});
  row.set("perplexity", Value{std::exp(whole.mean)});
  row.set("loss", Value{numbers(to_vector(curve.loss.mean(0)))});
  row.set("smoothed_perplexity", Value{numbers(line.perplexity)});
  if (!line.low.empty()) {
    row.set("smoothed_perplexity_low", Value{numbers(line.low)});
    row.set("smoothed_perplexity_high", Value{numbers(line.high)});
  }
  Array switches;
  for (const SwitchReport& report : report_switches(curve, curves))
    switches.push_back(Value{switch_table(report)});
  row.set("switches", Value{std::move(switches)});
  Array modes;
  for (const schedule::ModeSpan& span : curve.modes) {
    Table entry;
    entry.set("begin", Value{span.begin});
    entry.set("end", Value{span.end});
    entry.set("mode", Value{std::string(schedule::mode_name(span.mode))});
    modes.push_back(Value{std::move(entry)});
  }
  row.set("modes", Value{std::move(modes)});
  return row;
}

}  // namespace

std::vector<std::string> paper_switches(int64_t length) {
  constexpr int64_t kPaperLength = 2048;
  const std::vector<std::vector<int64_t>> positions = {
      {512}, {1024}, {1536}, {860}, {1331}, {512, 1024, 1536}, {225, 860, 1331, 1802}};
  std::vector<std::string> texts;
  for (const Mode first : {Mode::linear, Mode::attention}) {
    for (const std::vector<int64_t>& list : positions) {
      Mode mode = first;
      std::string text(schedule::mode_name(mode));
      for (const int64_t position : list) {
        mode = mode == Mode::linear ? Mode::attention : Mode::linear;
        text += fmt::format(",{}@{}", schedule::mode_name(mode), position * length / kPaperLength);
      }
      texts.push_back(std::move(text));
    }
  }
  return texts;
}

std::vector<double> moving_average(const std::vector<double>& values, int64_t window) {
  const auto size = static_cast<int64_t>(values.size());
  std::vector<double> sums(values.size() + 1, 0.0);
  for (int64_t i = 0; i < size; ++i) sums[i + 1] = sums[i] + values[i];
  std::vector<double> averages;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t begin = std::max<int64_t>(0, i - (window - 1) / 2);
    const int64_t end = std::min(size, i + window / 2 + 1);
    averages.push_back((sums[end] - sums[begin]) / static_cast<double>(end - begin));
  }
  return averages;
}

double confidence_factor(int64_t samples) {
  // Quantiles 0.975 of Student's distribution with 1 … 30 degrees of freedom.
  constexpr std::array<double, 30> kQuantiles = {12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306,
                                                 2.262,  2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
                                                 2.110,  2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
                                                 2.060,  2.056, 2.052, 2.048, 2.045, 2.042};
  expect(samples > 1, "a confidence interval needs at least two samples, got {}", samples);
  const auto degrees = static_cast<size_t>(samples - 1);
  if (degrees <= kQuantiles.size()) return kQuantiles[degrees - 1];
  return 1.95996 + 2.45 / static_cast<double>(degrees);  // to three digits from there on
}

SmoothedCurve smoothed(const Curve& curve, int64_t smooth) {
  const int64_t windows = curve.loss.size(0);
  SmoothedCurve result;
  std::vector<double> mean = moving_average(to_vector(curve.loss.mean(0)), smooth);
  if (windows > 1) {
    // Each window is smoothed by itself: neighbouring losses of one text are not independent, windows are.
    const at::Tensor lines = at::empty_like(curve.loss);
    for (int64_t window = 0; window < windows; ++window) {
      const std::vector<double> line = moving_average(to_vector(curve.loss[window]), smooth);
      std::copy(line.begin(), line.end(), lines[window].mutable_data_ptr<double>());
    }
    const double factor = confidence_factor(windows) / std::sqrt(static_cast<double>(windows));
    const std::vector<double> deviation = to_vector(lines.std(0));
    for (size_t i = 0; i < mean.size(); ++i) {
      result.low.push_back(std::exp(mean[i] - factor * deviation[i]));
      result.high.push_back(std::exp(mean[i] + factor * deviation[i]));
    }
  }
  for (double& value : mean) value = std::exp(value);
  result.perplexity = std::move(mean);
  return result;
}

std::vector<SwitchReport> report_switches(const Curve& curve, const std::vector<Curve>& references) {
  std::vector<SwitchReport> reports;
  for (size_t i = 1; i < curve.modes.size(); ++i) {
    const auto& span = curve.modes[i];
    const auto reference = std::find_if(references.begin(), references.end(), [&](const Curve& other) {
      return other.is_reference && other.modes[0].mode == span.mode;
    });
    if (reference == references.end()) continue;
    const at::Tensor difference = curve.loss - reference->loss;
    const int64_t room = span.end - span.begin;
    SwitchReport report{span.begin, curve.modes[i - 1].mode, span.mode, {}, {}};
    int64_t last = 0;
    for (const int64_t tokens : kExcessTokens) {
      if (tokens > room) break;
      report.excess.push_back(excess_over(difference, span.begin, 0, tokens));
      last = tokens;
    }
    if (last == std::end(kExcessTokens)[-1] && last < room) {
      report.excess.push_back(excess_over(difference, span.begin, last, room));
    }
    for (int64_t begin = 0; begin + kExcessBin <= std::min(room, kBinnedTokens); begin += kExcessBin) {
      report.bins.push_back(excess_over(difference, span.begin, begin, begin + kExcessBin));
    }
    reports.push_back(std::move(report));
  }
  return reports;
}

Table curve_table(const std::vector<Curve>& curves, int64_t smooth) {
  Table table;
  table.set("windows", Value{curves[0].loss.size(0)});
  table.set("length", Value{curves[0].loss.size(1)});
  table.set("smooth", Value{smooth});
  table.set("confidence", Value{0.95});
  Array positions, list;
  for (int64_t i = 0; i < curves[0].loss.size(1); ++i) positions.push_back(Value{i});
  table.set("positions", Value{std::move(positions)});
  for (const Curve& curve : curves) list.push_back(Value{curve_row(curve, curves, smooth)});
  table.set("curves", Value{std::move(list)});
  return table;
}

}  // namespace oryx::evaluation
