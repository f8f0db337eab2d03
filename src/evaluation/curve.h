// Perplexity by position under several schedules: what a switch of mixers costs, and for how long.
//
// The loss at position t is that of predicting token t + 1 from the output at t, which the mode at t gives.
// So a switch at position s first shows at s itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

#include "base/value.h"
#include "evaluation/plot.h"
#include "model/language_model.h"
#include "schedule/schedule.h"

namespace oryx::evaluation {

// Where `windows` windows of `length` tokens and the one that follows begin, spread evenly over a text of
// `tokens` tokens, none overlapping another's inputs; fewer where the text is shorter. Throws Error when not
// even one fits.
std::vector<int64_t> window_starts(int64_t tokens, int64_t length, int64_t windows);

struct Curve {
  std::string schedule;
  bool is_reference = false;  // one mode throughout
  schedule::ModeSpans modes;
  at::Tensor loss;  // [windows, length], float64 on the CPU
};

struct CurveOptions {
  int64_t batch = 4;                             // windows in one forward pass
  std::function<void(int64_t)> on_windows = {};  // called with the number just done
  std::function<bool()> cancelled = {};          // polled between batches
};

// One curve a schedule, in order. `windows`: int64 [n, length + 1]. Work is shared: positions up to which
// several schedules agree are computed once. Empty when cancelled.
std::vector<Curve> measure_curves(const model::LanguageModel& model,
                                  const std::vector<schedule::Schedule>& schedules, const at::Tensor& windows,
                                  const CurveOptions& options = {});

// Centred moving average over `window` positions, fewer at the ends.
std::vector<double> moving_average(const std::vector<double>& values, int64_t window);

// Loss beyond that of the target mode's unswitched curve over the first tokens after a switch.
struct Excess {
  int64_t begin = 0, end = 0;  // positions after the switch
  double mean = 0;             // nats a token
  double standard_error = 0;   // over windows; 0 for a single one
};

struct SwitchReport {
  int64_t position = 0;
  schedule::Mode from, to;
  // Of 16, 64, 128 and 256 tokens and of all that follow these 256, as far as they fit before the next
  // switch.
  std::vector<Excess> excess;
};

// `references`: curves of single modes, matched by their mode. Switches to a mode without one are left out.
std::vector<SwitchReport> report_switches(const Curve& curve, const std::vector<Curve>& references);

// schedule, mean loss by position, smoothed perplexity and switches of every curve, and how they were
// measured.
Table curve_table(const std::vector<Curve>& curves, int64_t smooth);

// Smoothed perplexity by position; smoothing averages the loss, then exponentiates.
Plot curve_plot(const std::vector<Curve>& curves, int64_t smooth);

}  // namespace oryx::evaluation
