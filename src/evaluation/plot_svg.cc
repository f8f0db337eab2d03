#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "evaluation/plot.h"

namespace oryx::evaluation {

namespace {

// Okabe and Ito, "Color universal design" (2008), without the yellow that a white page swallows.
constexpr std::array<const char*, 7> kColours = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                                 "#E69F00", "#56B4E9", "#000000"};
// Of the series that are not emphasised, in turn.
constexpr std::array<const char*, 6> kDashes = {"", "7 3", "2 3", "10 3 2 3", "14 4", "5 2 1 2 1 2"};

constexpr int kMaximumPoints = 1500;  // of a polyline: more than the pixels of its width serve no one

std::string escaped(const std::string& text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '"':
        result += "&quot;";
        break;
      default:
        result += c;
    }
  }
  return result;
}

// The part of the picture that the axes enclose, and what it shows.
struct Frame {
  double left, top, width, height;
  Axis x, y;

  double at_x(double value) const { return left + width * x.place(value); }
  double at_y(double value) const { return top + height * (1 - y.place(value)); }
};

struct Style {
  std::string colour, dash;
  bool emphasised;

  // What others are compared with is a broad pale band: a curve that coincides with it stays visible on top.
  std::string attributes() const {
    return fmt::format(R"(stroke="{}" stroke-width="{}"{}{} fill="none")", colour, emphasised ? "5" : "1.7",
                       emphasised ? R"( stroke-opacity="0.45")" : "",
                       dash.empty() ? "" : fmt::format(R"( stroke-dasharray="{}")", dash));
  }
};

std::vector<Style> styles(const Plot& plot) {
  std::vector<Style> result;
  size_t dash = 0;
  for (size_t i = 0; i < plot.series.size(); ++i) {
    const bool emphasised = plot.series[i].emphasised;
    result.push_back(
        {kColours[i % kColours.size()], emphasised ? "" : kDashes[dash++ % kDashes.size()], emphasised});
  }
  return result;
}

void draw_axes(std::string& svg, const Plot& plot, const Frame& frame) {
  const double bottom = frame.top + frame.height, right = frame.left + frame.width;
  for (const double tick : frame.y.ticks(8)) {
    const double y = frame.at_y(tick);
    svg += fmt::format("<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#E4E4E4\"/>\n",
                       frame.left, right, y, y);
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>\n", frame.left - 8,
                       y + 4, tick_text(tick));
  }
  for (const double tick : frame.x.ticks(9)) {
    const double x = frame.at_x(tick);
    svg += fmt::format("<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#333\"/>\n", x,
                       x, bottom, bottom + 5);
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>\n", x, bottom + 20,
                       tick_text(tick));
  }
  svg += fmt::format(
      "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" fill=\"none\" stroke=\"#333\"/>\n",
      frame.left, frame.top, frame.width, frame.height);
  svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>\n",
                     frame.left + frame.width / 2, bottom + 42, escaped(plot.x_label));
  const double middle = frame.top + frame.height / 2;
  svg += fmt::format(
      "<text x=\"18\" y=\"{0:.1f}\" text-anchor=\"middle\" transform=\"rotate(-90 18 {0:.1f})\">{1}</text>\n",
      middle, escaped(plot.y_label));
  svg += fmt::format("<text x=\"{:.1f}\" y=\"24\" font-size=\"16\" font-weight=\"bold\">{}</text>\n",
                     frame.left, escaped(plot.title));
}

void draw_markers(std::string& svg, const Plot& plot, const Frame& frame) {
  for (const Marker& marker : plot.markers) {
    const double x = frame.at_x(marker.x);
    svg += fmt::format(
        "<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#888\" "
        "stroke-dasharray=\"1 3\"/>\n",
        x, x, frame.top, frame.top + frame.height);
    svg += fmt::format(
        "<text x=\"{:.1f}\" y=\"{:.1f}\" fill=\"#555\" font-size=\"11\" text-anchor=\"middle\">{}</text>\n",
        x, frame.top - 6, escaped(marker.label));
  }
}

void draw_series(std::string& svg, const Series& series, const Style& style, const Plot& plot,
                 const Frame& frame) {
  const size_t stride = std::max<size_t>(1, series.x.size() / kMaximumPoints);
  std::string path;
  bool pen_down = false;
  for (size_t i = 0; i < series.x.size(); i += stride) {
    const double value = series.y[i];
    if (!std::isfinite(value) || (plot.logarithmic_y && value <= 0)) {
      pen_down = false;
      continue;
    }
    path += fmt::format("{}{:.1f} {:.1f}", pen_down ? "L" : "M", frame.at_x(series.x[i]), frame.at_y(value));
    pen_down = true;
  }
  svg += fmt::format("<path d=\"{}\" {} stroke-linejoin=\"round\"/>\n", path, style.attributes());
}

// To the right of the frame, one line a series.
void draw_legend(std::string& svg, const Plot& plot, const std::vector<Style>& style, const Frame& frame) {
  const double left = frame.left + frame.width + 16;
  for (size_t i = 0; i < plot.series.size(); ++i) {
    const double y = frame.top + 10 + 20 * static_cast<double>(i);
    svg += fmt::format("<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\" {}/>\n", left,
                       left + 34, y, y, style[i].attributes());
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n", left + 42, y + 4,
                       escaped(plot.series[i].name));
  }
}

}  // namespace

std::string to_svg(const Plot& plot, int width, int height) {
  size_t longest = 0;
  for (const Series& series : plot.series) longest = std::max(longest, series.name.size());
  // Seven pixels a letter at this size, at most half of the picture.
  const double legend = std::min(width / 2.0, 74 + 7.0 * static_cast<double>(longest));
  const auto [x_axis, y_axis] = plot_axes(plot);
  const Frame frame{74, 56, width - 74 - legend, height - 56.0 - 60, x_axis, y_axis};
  const std::vector<Style> style = styles(plot);

  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} {1}\" "
      "font-family=\"sans-serif\" font-size=\"13\" fill=\"#111\">\n"
      "<title>{2}</title>\n<rect width=\"{0}\" height=\"{1}\" fill=\"#FFF\"/>\n"
      "<clipPath id=\"frame\"><rect x=\"{3:.1f}\" y=\"{4:.1f}\" width=\"{5:.1f}\" "
      "height=\"{6:.1f}\"/></clipPath>\n",
      width, height, escaped(plot.title), frame.left, frame.top, frame.width, frame.height);
  draw_axes(svg, plot, frame);
  draw_markers(svg, plot, frame);
  svg += "<g clip-path=\"url(#frame)\">\n";
  // What others are compared with lies below them.
  for (const bool emphasised : {true, false}) {
    for (size_t i = 0; i < plot.series.size(); ++i) {
      if (plot.series[i].emphasised == emphasised) draw_series(svg, plot.series[i], style[i], plot, frame);
    }
  }
  svg += "</g>\n";
  draw_legend(svg, plot, style, frame);
  return svg + "</svg>\n";
}

}  // namespace oryx::evaluation
