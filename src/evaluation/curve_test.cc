#include "evaluation/curve.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"

namespace oryx::evaluation {
namespace {

using schedule::Mode;
using schedule::Schedule;

constexpr int64_t kLength = 40;

model::LanguageModel tiny_model(const std::string& linear) {
  auto config = model::ModelConfig::with_mixers({"attention", linear});
  config.layers = 2;
  config.width = 32;
  config.heads = config.kv_heads = config.value_heads = 2;
  config.head_dim = config.value_dim = 16;
  config.mlp_width = 48;
  config.vocabulary = 64;
  auto weights = model::initial_weights(config, 4, at::kDouble);
  for (auto& [name, tensor] : weights.entries()) {
    if (name == "embedding.weight") tensor.mul_(20.0);
  }
  return {config, std::move(weights), at::kDouble};
}

at::Tensor some_windows(int64_t count) {
  return (at::arange(count * (kLength + 1), at::kLong).square() * 5 % 61).view({count, kLength + 1});
}

TEST(WindowStarts, SpreadWithoutOverlap) {
  EXPECT_EQ(window_starts(101, 10, 5), (std::vector<int64_t>{0, 20, 40, 60, 80}));
  EXPECT_EQ(window_starts(101, 10, 100).size(), 10u);
  EXPECT_EQ(window_starts(11, 10, 3), (std::vector<int64_t>{0}));
  EXPECT_EQ(window_starts(1000, 10, 7).back() + 11 <= 1000, true);
  EXPECT_THROW(window_starts(10, 10, 3), Error);
  EXPECT_THROW(window_starts(0, 10, 3), Error);
}

TEST(MovingAverage, IsCentredAndShrinksAtTheEnds) {
  EXPECT_EQ(moving_average({1, 2, 6}, 1), (std::vector<double>{1, 2, 6}));
  EXPECT_EQ(moving_average({1, 2, 6, 10}, 3), (std::vector<double>{1.5, 3, 6, 8}));
  EXPECT_EQ(moving_average({2, 4}, 100), (std::vector<double>{3, 3}));
}

// Each schedule by itself, in one piece, from whole logits.
TEST(MeasureCurves, SharedWorkIsTheWorkOfEachAlone) {
  for (const char* linear : {"ssd", "gated_delta"}) {
    const auto model = tiny_model(linear);
    const at::Tensor windows = some_windows(5);
    std::vector<Schedule> schedules;
    for (const char* text : {"attention", "linear", "attention,linear@13", "attention,linear@13,attention@14",
                             "linear,attention@50%", "random(0.5,3,chunk=4)", "linear"}) {
      schedules.push_back(Schedule::parse(text));
    }
    int64_t done = 0;
    const auto curves =
        measure_curves(model, schedules, windows, {.batch = 2, .on_windows = [&](int64_t n) { done += n; }});
    EXPECT_EQ(done, 5);
    ASSERT_EQ(curves.size(), schedules.size());
    const c10::NoGradGuard no_grad;
    for (size_t i = 0; i < curves.size(); ++i) {
      SCOPED_TRACE(curves[i].schedule);
      EXPECT_EQ(curves[i].is_reference, i == 0 || i == 1 || i == 6);
      const auto hidden =
          model.hidden(windows.slice(1, 0, kLength).contiguous(), {schedules[i].spans(kLength, kLength)});
      const auto expected = -at::log_softmax(model.logits(hidden), 1)
                                 .gather(1, windows.slice(1, 1).reshape({-1, 1}))
                                 .view({5, kLength});
      EXPECT_LT((expected - curves[i].loss).abs().max().item<double>(), 1e-9);
    }
    // The test can fail: the modes do differ.
    EXPECT_GT((curves[0].loss - curves[1].loss).abs().max().item<double>(), 1e-3);
  }
}

TEST(MeasureCurves, StopsWhenCancelled) {
  int polls = 0;
  EXPECT_TRUE(measure_curves(tiny_model("ssd"), {Schedule::parse("linear")}, some_windows(4),
                             {.batch = 1, .cancelled = [&] { return ++polls == 3; }})
                  .empty());
  EXPECT_EQ(polls, 3);
}

Curve curve_of(const std::string& text, int64_t length, const at::Tensor& loss) {
  const auto modes = Schedule::parse(text).spans(length, length);
  return {text, modes.size() == 1, modes, loss};
}

TEST(ReportSwitches, ExcessOverTheTargetMode) {
  const int64_t length = 500;
  const at::Tensor attention = at::full({2, length}, 2.0, at::kDouble),
                   linear = at::full({2, length}, 3.0, at::kDouble);
  at::Tensor switched = attention.clone();
  switched.slice(1, 100, 400).copy_(linear.slice(1, 100, 400));
  switched.slice(1, 100, 132).add_(0.5);     // 32 tokens of excess after the first switch
  switched.slice(1, 400, 416).add_(0.25);    // 16 after the second
  switched[0].slice(0, 400, 416).add_(0.1);  // more in one window
  const std::vector<Curve> curves = {curve_of("attention", length, attention),
                                     curve_of("linear", length, linear),
                                     curve_of("attention,linear@100,attention@400", length, switched)};
  const auto reports = report_switches(curves[2], curves);
  ASSERT_EQ(reports.size(), 2u);
  EXPECT_EQ(reports[0].position, 100);
  EXPECT_EQ(reports[0].to, Mode::linear);
  ASSERT_EQ(reports[0].excess.size(), 5u);
  EXPECT_NEAR(reports[0].excess[0].mean, 0.5, 1e-12);
  EXPECT_NEAR(reports[0].excess[1].mean, 0.25, 1e-12);
  EXPECT_NEAR(reports[0].excess[3].mean, 0.5 * 32 / 256, 1e-12);
  EXPECT_EQ(reports[0].excess[4].begin, 256);
  EXPECT_EQ(reports[0].excess[4].end, 300);
  EXPECT_NEAR(reports[0].excess[4].mean, 0, 1e-12);
  // A hundred tokens hold windows of 16 and 64 only.
  ASSERT_EQ(reports[1].excess.size(), 2u);
  EXPECT_NEAR(reports[1].excess[0].mean, 0.3, 1e-12);
  EXPECT_NEAR(reports[1].excess[0].standard_error, 0.05, 1e-12);
  EXPECT_TRUE(report_switches(curves[0], curves).empty());
  EXPECT_EQ(report_switches(curves[2], {curves[0]}).size(), 1u);
}

TEST(ReportSwitches, BinsFollowTheSwitch) {
  const int64_t length = 1000;
  const at::Tensor linear = at::rand({3, length}, at::kDouble);
  at::Tensor switched = linear.clone();
  switched.slice(1, 700, 708).add_(1.0);
  switched.slice(1, 708, 716).add_(0.5);
  switched[1].slice(0, 700, 708).add_(0.3);
  const std::vector<Curve> curves = {curve_of("linear", length, linear),
                                     curve_of("attention,linear@700", length, switched)};
  const SwitchReport report = report_switches(curves[1], curves)[0];
  ASSERT_EQ(report.bins.size(), 300u / kExcessBin);  // up to the end
  EXPECT_NEAR(report.bins[0].mean, 1.1, 1e-12);
  // Paired: what the windows have in common does not count, however different their texts.
  EXPECT_NEAR(report.bins[0].standard_error, 0.1, 1e-12);
  EXPECT_NEAR(report.bins[1].mean, 0.5, 1e-12);
  EXPECT_NEAR(report.bins[1].standard_error, 0, 1e-12);
  EXPECT_EQ(report.bins[1].begin, 8);
  EXPECT_NEAR(report.bins[2].mean, 0, 1e-12);
}

TEST(Smoothed, BandIsStudentsIntervalOverSmoothedWindows) {
  const at::Tensor loss = at::rand({4, 9}, at::kDouble);
  const SmoothedCurve curve = smoothed(curve_of("linear", 9, loss), 3);
  const at::Tensor at_4 = loss.slice(1, 3, 6).mean(1);
  const double mean = at_4.mean().item<double>(), error = at_4.std().item<double>() / 2;
  EXPECT_NEAR(curve.perplexity[4], std::exp(mean), 1e-9);
  EXPECT_NEAR(curve.low[4], std::exp(mean - 3.182 * error), 1e-9);
  EXPECT_NEAR(curve.high[4], std::exp(mean + 3.182 * error), 1e-9);
  EXPECT_TRUE(smoothed(curve_of("linear", 9, loss.slice(0, 0, 1)), 3).low.empty());
  // Quantiles of a table: 0.975 with 30, 40, 60, 120 degrees of freedom.
  EXPECT_NEAR(confidence_factor(31), 2.042, 1e-3);
  EXPECT_NEAR(confidence_factor(41), 2.021, 1e-3);
  EXPECT_NEAR(confidence_factor(61), 2.000, 1e-3);
  EXPECT_NEAR(confidence_factor(121), 1.980, 1e-3);
  EXPECT_THROW(confidence_factor(1), Error);
}

TEST(PaperSwitches, AreThePapersAndScaleWithTheLength) {
  const auto paper = paper_switches(2048);
  ASSERT_EQ(paper.size(), 14u);
  EXPECT_EQ(paper[0], "linear,attention@512");
  EXPECT_EQ(paper[6], "linear,attention@225,linear@860,attention@1331,linear@1802");
  EXPECT_EQ(paper[12], "attention,linear@512,attention@1024,linear@1536");
  EXPECT_EQ(paper_switches(512)[4], "linear,attention@332");
  std::vector<Curve> curves;
  const at::Tensor loss = at::ones({2, 2048}, at::kDouble);
  for (const char* mode : {"attention", "linear"}) curves.push_back(curve_of(mode, 2048, loss));
  for (const std::string& text : paper) curves.push_back(curve_of(text, 2048, loss));
  const std::vector<Plot> plots = curve_plots(curves, 64);
  ASSERT_EQ(plots.size(), 4u);
  EXPECT_EQ(plots[0].title, "One switch, linear to attention, 2 windows of 2048 tokens");
  EXPECT_EQ(plots[0].series.size(), 7u);
  EXPECT_EQ(plots[3].title, "Several switches, attention first, 2 windows of 2048 tokens");
  EXPECT_EQ(plots[3].series.size(), 4u);
  for (const Plot& plot : plots) EXPECT_EQ(plot.y_range, plots[0].y_range);
}

TEST(CurveReport, TableAndPlotSayWhatWasMeasured) {
  const at::Tensor loss = at::full({3, 8}, std::log(5.0), at::kDouble);
  const std::vector<Curve> curves = {curve_of("attention", 8, loss), curve_of("attention,linear@4", 8, loss)};
  const Table table = curve_table(curves, 4);
  EXPECT_EQ(*table.find("windows")->as<int64_t>(), 3);
  EXPECT_EQ(table.find("positions")->as<Array>()->size(), 8u);
  const Array& rows = *table.find("curves")->as<Array>();
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_NEAR(*rows[0].as<Table>()->find("perplexity")->as<double>(), 5.0, 1e-9);
  const std::vector<Plot> plots = curve_plots(curves, 4);
  ASSERT_EQ(plots.size(), 1u);
  const Plot& plot = plots[0];
  EXPECT_EQ(plot.series.size(), 2u);
  EXPECT_TRUE(plot.series[0].emphasised);
  EXPECT_NEAR(plot.series[1].y[3], 5.0, 1e-9);
  ASSERT_EQ(plot.markers.size(), 1u);
  EXPECT_EQ(plot.markers[0].x, 4);
}

}  // namespace
}  // namespace oryx::evaluation
