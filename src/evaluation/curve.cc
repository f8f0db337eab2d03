#include "evaluation/curve.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "base/error.h"

namespace oryx::evaluation {

namespace {

using schedule::Mode;
using schedule::ModeSpans;

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

}  // namespace oryx::evaluation
