#include "evaluation/curve.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.h"

namespace oryx::evaluation {

namespace {

using schedule::Mode;
using schedule::ModeSpans;

constexpr int64_t kExcessTokens[] = {16, 64, 128, 256};
constexpr size_t kMostMarkers = 12;  // more vertical lines than this hide the curves

const schedule::ModeSpan& span_at(const ModeSpans& spans, int64_t position) {
  return *std::find_if(spans.begin(), spans.end(), [&](const auto& span) { return position < span.end; });
}

// Runs one batch of windows through a set of schedules: together as far as they agree, then each on its own
// copy of the state.
class SharedRun {
 public:
  SharedRun(const model::LanguageModel& model, const at::Tensor& windows, int64_t first,
            std::vector<Curve>& curves)
      : model_(model),
        inputs_(windows.slice(1, 0, -1).to(model.device()).contiguous()),
        targets_(windows.slice(1, 1).to(model.device()).contiguous()),
        first_(first),
        curves_(curves) {}

  void run() {
    std::vector<size_t> all(curves_.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = i;
    run(all, 0, model_.empty_state(inputs_.size(0)));
  }

 private:
  // The end of the run from `begin` on which the curves of `group` have equal modes.
  int64_t agreement(const std::vector<size_t>& group, int64_t begin) const {
    const int64_t length = inputs_.size(1);
    int64_t position = begin;
    while (position < length) {
      int64_t end = length;
      const Mode mode = span_at(curves_[group[0]].modes, position).mode;
      for (const size_t i : group) {
        const auto& span = span_at(curves_[i].modes, position);
        if (span.mode != mode) return position;
        end = std::min(end, span.end);
      }
      position = end;
    }
    return length;
  }

  void run(const std::vector<size_t>& group, int64_t begin, model::JointState state) {
    const int64_t length = inputs_.size(1);
    const int64_t end = agreement(group, begin);
    if (end > begin) {
      const ModeSpans spans = schedule::cut(curves_[group[0]].modes, begin, end);
      const at::Tensor hidden = model_.hidden(inputs_.slice(1, begin, end).contiguous(), {spans}, &state);
      const at::Tensor loss = model_.loss(hidden, targets_.slice(1, begin, end).reshape(-1), 1.0)
                                  .second.view({inputs_.size(0), end - begin})
                                  .to(at::kCPU, at::kDouble);
      for (const size_t i : group) {
        curves_[i].loss.narrow(0, first_, loss.size(0)).slice(1, begin, end).copy_(loss);
      }
    }
    if (end == length) return;
    std::vector<size_t> attention, linear;
    for (const size_t i : group) {
      (span_at(curves_[i].modes, end).mode == Mode::attention ? attention : linear).push_back(i);
    }
    run(attention, end, state.clone());
    run(linear, end, std::move(state));
  }

  const model::LanguageModel& model_;
  at::Tensor inputs_, targets_;  // [batch, length]
  int64_t first_;                // window of the batch's first row
  std::vector<Curve>& curves_;
};

std::vector<double> mean_by_position(const Curve& curve) {
  const at::Tensor mean = curve.loss.mean(0).contiguous();
  const double* values = mean.const_data_ptr<double>();
  return {values, values + mean.size(0)};
}

std::vector<double> smoothed_perplexity(const Curve& curve, int64_t smooth) {
  std::vector<double> values = moving_average(mean_by_position(curve), smooth);
  for (double& value : values) value = std::exp(value);
  return values;
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

Table switch_table(const SwitchReport& report) {
  Table table;
  table.set("position", Value{report.position});
  table.set("from", Value{std::string(schedule::mode_name(report.from))});
  table.set("to", Value{std::string(schedule::mode_name(report.to))});
  Array rows;
  for (const Excess& excess : report.excess) {
    Table row;
    row.set("begin", Value{excess.begin});
    row.set("end", Value{excess.end});
    row.set("excess_loss", Value{excess.mean});
    row.set("standard_error", Value{excess.standard_error});
    rows.push_back(Value{std::move(row)});
  }
  table.set("excess", Value{std::move(rows)});
  return table;
}

}  // namespace

std::vector<int64_t> window_starts(int64_t tokens, int64_t length, int64_t windows) {
  const int64_t available = (tokens - 1) / length;
  expect(tokens > length, "the data holds {} tokens: a window of length {} needs {}", tokens, length,
         length + 1);
  const int64_t count = std::min(available, windows);
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < count; ++i) starts.push_back(i * available / count * length);
  return starts;
}

std::vector<Curve> measure_curves(const model::LanguageModel& model,
                                  const std::vector<schedule::Schedule>& schedules, const at::Tensor& windows,
                                  const CurveOptions& options) {
  expect(windows.dim() == 2 && windows.size(0) > 0 && windows.size(1) > 1 && !schedules.empty(),
         "expected windows of at least two tokens and at least one schedule");
  const c10::NoGradGuard no_grad;
  const int64_t length = windows.size(1) - 1;
  std::vector<Curve> curves;
  for (const schedule::Schedule& schedule : schedules) {
    ModeSpans modes = schedule.spans(length, length);
    curves.push_back(
        {schedule.text(), modes.size() == 1, modes, at::empty({windows.size(0), length}, at::kDouble)});
  }
  for (int64_t first = 0; first < windows.size(0); first += options.batch) {
    if (options.cancelled && options.cancelled()) return {};
    const at::Tensor batch = windows.slice(0, first, std::min(windows.size(0), first + options.batch));
    SharedRun(model, batch, first, curves).run();
    if (options.on_windows) options.on_windows(batch.size(0));
  }
  return curves;
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
    SwitchReport report{span.begin, curve.modes[i - 1].mode, span.mode, {}};
    int64_t last = 0;
    for (const int64_t tokens : kExcessTokens) {
      if (tokens > room) break;
      report.excess.push_back(excess_over(difference, span.begin, 0, tokens));
      last = tokens;
    }
    if (last == std::end(kExcessTokens)[-1] && last < room) {
      report.excess.push_back(excess_over(difference, span.begin, last, room));
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
  Array positions, list;
  for (int64_t i = 0; i < curves[0].loss.size(1); ++i) positions.push_back(Value{i});
  table.set("positions", Value{std::move(positions)});
  for (const Curve& curve : curves) {
    const std::vector<double> loss = mean_by_position(curve);
    const double mean = curve.loss.mean().item<double>();
    Table row;
    row.set("schedule", Value{curve.schedule});
    row.set("reference", Value{curve.is_reference});
    row.set("mean_loss", Value{mean});
    row.set("perplexity", Value{std::exp(mean)});
    row.set("loss", Value{numbers(loss)});
    row.set("smoothed_perplexity", Value{numbers(smoothed_perplexity(curve, smooth))});
    Array switches;
    for (const SwitchReport& report : report_switches(curve, curves))
      switches.push_back(Value{switch_table(report)});
    row.set("switches", Value{std::move(switches)});
    list.push_back(Value{std::move(row)});
  }
  table.set("curves", Value{std::move(list)});
  return table;
}

Plot curve_plot(const std::vector<Curve>& curves, int64_t smooth) {
  const int64_t windows = curves[0].loss.size(0), length = curves[0].loss.size(1);
  Plot plot;
  plot.title = fmt::format("Perplexity by position, {} windows of {} tokens", windows, length);
  plot.x_label = "position";
  plot.y_label = fmt::format("perplexity, loss averaged over {} positions", smooth);
  plot.logarithmic_y = true;
  // A text's first tokens are far harder than all others: the range is that of the rest.
  const int64_t settled = std::min(length - 1, std::max(smooth / 2, length / 32));
  std::set<int64_t> switches;
  double low = INFINITY, high = 0;
  for (const Curve& curve : curves) {
    Series series{curve.schedule, {}, smoothed_perplexity(curve, smooth), curve.is_reference};
    for (int64_t i = 0; i < length; ++i) series.x.push_back(static_cast<double>(i));
    low = std::min(low, *std::min_element(series.y.begin(), series.y.end()));
    high = std::max(high, *std::max_element(series.y.begin() + settled, series.y.end()));
    plot.series.push_back(std::move(series));
    for (size_t i = 1; i < curve.modes.size(); ++i) switches.insert(curve.modes[i].begin);
  }
  plot.y_range = {low * 0.98, high * 1.02};
  if (switches.size() <= kMostMarkers) {
    for (const int64_t position : switches) {
      plot.markers.push_back({static_cast<double>(position), fmt::format("{}", position)});
    }
  }
  return plot;
}

}  // namespace oryx::evaluation
