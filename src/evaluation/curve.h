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

// The schedules of the paper's switch curves: in both directions one switch at 512, 1024, 1536, 860 or 1331,
// and several at {512, 1024, 1536} and {225, 860, 1331, 1802}. These are positions of windows of 2048 tokens;
// windows of another length have them at the same share of it, rounded down.
std::vector<std::string> paper_switches(int64_t length);

// Centred moving average over `window` positions, fewer at the ends.
std::vector<double> moving_average(const std::vector<double>& values, int64_t window);

// The half width of a 95 % confidence interval in standard errors: Student's quantile for the mean of
// `samples` independent values, at least two.
double confidence_factor(int64_t samples);

// By position, each smoothed by moving_average over `smooth` positions of the loss.
struct SmoothedCurve {
  std::vector<double> perplexity;
  // The 95 % confidence interval over windows; empty for a single window.
  std::vector<double> low, high;
};

SmoothedCurve smoothed(const Curve& curve, int64_t smooth);

// Loss beyond that of the target mode's unswitched curve on the same windows.
struct Excess {
  int64_t begin = 0, end = 0;  // positions after the switch
  double mean = 0;             // nats a token
  double standard_error = 0;   // of the differences, paired over windows; 0 for a single one
};

struct SwitchReport {
  int64_t position = 0;
  schedule::Mode from, to;
  // Of 16, 64, 128 and 256 tokens and of all that follow these 256, as far as they fit before the next
  // switch.
  std::vector<Excess> excess;
  // Of every kExcessBin tokens, up to 512 or the next switch.
  std::vector<Excess> bins;
};

constexpr int64_t kExcessBin = 8;

// `references`: curves of single modes, matched by their mode. Switches to a mode without one are left out.
std::vector<SwitchReport> report_switches(const Curve& curve, const std::vector<Curve>& references);

// schedule, mean loss by position, smoothed perplexity with its band and switches of every curve, and how
// they were measured.
Table curve_table(const std::vector<Curve>& curves, int64_t smooth);

// Smoothed perplexity by position; smoothing averages the loss, then exponentiates. One plot for a few
// curves; for many one for each direction of a single switch and one for each first mode of several.
std::vector<Plot> curve_plots(const std::vector<Curve>& curves, int64_t smooth);

// What curve_plots draws, from numbers alone.
struct CurveLine {
  std::string schedule;
  bool is_reference = false;
  std::vector<int64_t> switches;  // positions
  schedule::Mode first, last;     // modes
  SmoothedCurve curve;
};
std::vector<Plot> curve_plots(const std::vector<CurveLine>& lines, int64_t windows, int64_t length,
                              int64_t smooth);

}  // namespace oryx::evaluation
