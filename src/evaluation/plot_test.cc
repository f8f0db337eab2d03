#include "evaluation/plot.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/error.h"

namespace oryx::evaluation {
namespace {

Plot two_lines() {
  Plot plot;
  plot.title = "loss & <friends>";
  plot.x_label = "position";
  plot.y_label = "perplexity";
  plot.series = {{"attention", {0, 50, 100}, {10, 20, 30}, true},
                 {"linear@7", {0, 50, 100}, {30, 20, 10}, false}};
  plot.markers = {{50, "50"}};
  return plot;
}

size_t count(const std::string& text, const std::string& part) {
  size_t found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

TEST(Axis, PlacesAndTicks) {
  const Axis even(0, 2000, Scale::linear);
  EXPECT_DOUBLE_EQ(even.place(500), 0.25);
  EXPECT_EQ(even.ticks(5), (std::vector<double>{0, 500, 1000, 1500, 2000}));
  const Axis logarithmic(1, 10000, Scale::logarithmic);
  EXPECT_DOUBLE_EQ(logarithmic.place(100), 0.5);
  EXPECT_EQ(logarithmic.ticks(5), (std::vector<double>{1, 10, 100, 1000, 10000}));
  const Axis binary(2, 32, Scale::binary);
  EXPECT_DOUBLE_EQ(binary.place(8), 0.5);
  EXPECT_EQ(binary.ticks(5), (std::vector<double>{2, 4, 8, 16, 32}));
  EXPECT_EQ(binary.ticks(4), (std::vector<double>{2, 8, 32}));
  EXPECT_EQ(Axis(3, 20, Scale::binary).ticks(8), (std::vector<double>{4, 8, 16}));
  EXPECT_GE(Axis(5, 7, Scale::binary).ticks(6).size(), 1u);  // no power of two inside
  EXPECT_THROW(Axis(0, 8, Scale::binary), Error);
  for (const auto& [low, high] : {std::pair{0.013, 0.0131}, {-3.0, 12.5}, {1e9, 1.7e9}, {5.0, 5.0}}) {
    const Axis axis(low, high, Scale::linear);
    const auto ticks = axis.ticks(6);
    EXPECT_GE(ticks.size(), 1u) << low;
    EXPECT_LE(ticks.size(), 6u) << low;
    for (const double tick : ticks)
      EXPECT_TRUE(axis.place(tick) > -1e-6 && axis.place(tick) < 1 + 1e-6) << tick;
  }
  for (const double high : {12.0, 40.0, 3e5}) {
    const auto ticks = Axis(9, high, Scale::logarithmic).ticks(8);
    EXPECT_TRUE(ticks.size() >= 2 && ticks.size() <= 8) << high;
  }
  EXPECT_THROW(Axis(0, 1, Scale::logarithmic), Error);
  EXPECT_THROW(Axis(0, std::numeric_limits<double>::infinity(), Scale::linear), Error);
  EXPECT_EQ(tick_text(1500), "1500");
  EXPECT_EQ(tick_text(0.1 + 0.2), "0.3");
}

TEST(Svg, HoldsEverySeriesLabelAndMarker) {
  const std::string svg = to_svg(two_lines());
  EXPECT_EQ(count(svg, "<path "), 2u);
  EXPECT_NE(svg.find(">attention</text>"), std::string::npos);
  EXPECT_NE(svg.find(">linear@7</text>"), std::string::npos);
  EXPECT_NE(svg.find("loss &amp; &lt;friends&gt;"), std::string::npos);
  EXPECT_EQ(svg.find("<friends>"), std::string::npos);
  EXPECT_NE(svg.find(">perplexity</text>"), std::string::npos);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  // Told apart without colour, in the curve and in the legend: the emphasised one is a band.
  EXPECT_EQ(count(svg, "stroke-opacity"), 2u);
  Plot more = two_lines();
  more.series.push_back({"third", {0, 100}, {5, 6}, false});
  EXPECT_EQ(count(to_svg(more), "stroke-dasharray=\"7 3\""), 2u);
}

TEST(Svg, GapsBreakTheLine) {
  Plot plot = two_lines();
  plot.series = {{"a", {0, 1, 2, 3, 4}, {1, 2, std::nan(""), 4, 5}, false}};
  EXPECT_EQ(count(to_svg(plot).substr(to_svg(plot).find("<path ")), "M"), 2u);
  plot.logarithmic_y = true;
  plot.series[0].y = {1, -2, 3, 4, 0};
  EXPECT_EQ(to_svg(plot).find("inf"), std::string::npos);
}

TEST(Svg, BandsStopAtGapsAndWidenTheAxis) {
  Plot plot = two_lines();
  plot.series = {
      {"a", {0, 1, 2, 3, 4}, {1, 2, 3, 4, 5}, false, {0, 1, std::nan(""), 3, -9}, {2, 3, 4, 5, 6}}};
  const std::string svg = to_svg(plot);
  const size_t band = svg.find("<path class=\"band\"");
  ASSERT_NE(band, std::string::npos);
  EXPECT_EQ(count(svg.substr(band, svg.find("/>", band) - band), "Z"), 2u);
  EXPECT_EQ(plot_axes(plot).second.low(), -9);
  EXPECT_EQ(plot_axes(plot).second.high(), 6);
  plot.series[0].low.pop_back();
  EXPECT_THROW(to_svg(plot), Error);
}

TEST(Svg, SeveralPlotsKeepTheirClipPathsApart) {
  const std::string svg = to_svg(std::vector{two_lines(), two_lines()}, 900, 300);
  EXPECT_NE(svg.find("height=\"600\""), std::string::npos);
  EXPECT_EQ(count(svg, "<clipPath id=\"frame-0\""), 1u);
  EXPECT_EQ(count(svg, "<clipPath id=\"frame-1\""), 1u);
}

TEST(PageSvg, TakesColoursFromThePageAndNumbersItsSeries) {
  Plot plot = two_lines();
  plot.series[1].colour = 4;
  plot.series[1].points = true;
  plot.series[1].labels = {"every(2)", "", "<3>"};
  plot.baseline = -1;
  const std::string svg = to_page_svg(plot, "f1", 500, 300);
  EXPECT_NE(svg.find("stroke:var(--c0)"), std::string::npos);
  EXPECT_NE(svg.find("stroke:var(--c4)"), std::string::npos);
  EXPECT_EQ(count(svg, "data-series="), 2u);
  EXPECT_EQ(count(svg, "class=\"point\""), 3u);
  EXPECT_NE(svg.find("&lt;3&gt;"), std::string::npos);
  EXPECT_EQ(plot_axes(plot).second.low(), -1);
  EXPECT_EQ(svg.find("http"), std::string::npos);  // nothing to fetch
}

TEST(SeriesStyles, ColoursAndDashesInTurnOrAsGiven) {
  Plot plot = two_lines();
  plot.series.push_back({"third", {0}, {1}});
  plot.series.push_back({"fourth", {0}, {1}});
  plot.series[3].colour = 0;
  plot.series[3].dash = 2;
  const auto styles = series_styles(plot, false);
  EXPECT_EQ(styles[0].dash, "");
  EXPECT_EQ(styles[1].colour, palette_colour(1));
  EXPECT_EQ(styles[1].dash, "");
  EXPECT_NE(styles[2].dash, "");
  EXPECT_EQ(styles[3].colour, palette_colour(0));
  EXPECT_NE(styles[3].dash, styles[2].dash);
}

TEST(HeatmapSvg, HoldsEveryCell) {
  const Heatmap heatmap{"needle",         "tokens",      "depth",
                        {"1024", "2048"}, {"0%", "50%"}, {{1, 0.254}, {std::nan(""), 0}}};
  const std::string svg = to_page_svg(heatmap);
  EXPECT_EQ(count(svg, "<rect"), 4u);
  EXPECT_NE(svg.find(">25</text>"), std::string::npos);
  EXPECT_NE(svg.find(">100</text>"), std::string::npos);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  Heatmap ragged = heatmap;
  ragged.values[1].pop_back();
  EXPECT_THROW(to_page_svg(ragged), Error);
}

TEST(EscapeMarkup, LeavesNothingThatMarkupReads) {
  EXPECT_EQ(escape_markup("<a href=\"x\">&'\x01\n"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;\xEF\xBF\xBD\n");
}

TEST(Terminal, FitsItsWidth) {
  for (const int columns : {20, 60, 120}) {
    const std::string text = to_terminal(two_lines(), columns, 10, false);
    size_t begin = text.find('\n') + 1;
    for (int row = 0; row < 10; ++row) {
      const size_t end = text.find('\n', begin);
      int width = 0;
      for (size_t i = begin; i < end; ++i) width += (text[i] & 0xC0) != 0x80;
      EXPECT_LE(width, columns);
      begin = end + 1;
    }
    EXPECT_EQ(text.find('\x1b'), std::string::npos);
  }
}

TEST(Terminal, RisesWithTheValues) {
  Plot plot = two_lines();
  plot.series.resize(1);
  const std::string text = to_terminal(plot, 60, 8, false);
  // Letters stand for series where there is no colour: the first row holds the end, the last the beginning.
  std::vector<std::string> rows;
  for (size_t begin = text.find('\n') + 1; rows.size() < 8; begin = text.find('\n', begin) + 1) {
    rows.push_back(text.substr(begin, text.find('\n', begin) - begin));
  }
  EXPECT_GT(rows.front().find('a'), rows.back().find('a'));
  EXPECT_NE(rows.back().find('a'), std::string::npos);
  EXPECT_NE(to_terminal(plot, 60, 8, true).find("\x1b[38;5;"), std::string::npos);
}

TEST(Plot, RefusesWhatCannotBeDrawn) {
  Plot plot = two_lines();
  plot.series[0].y.pop_back();
  EXPECT_THROW(to_svg(plot), Error);
  plot.series = {{"a", {1}, {std::nan("")}, false}};
  EXPECT_THROW(to_terminal(plot, 40, 5, false), Error);
  plot.series = {{"a", {1}, {3}, false}};
  EXPECT_NO_THROW(to_svg(plot));
}

}  // namespace
}  // namespace oryx::evaluation
