#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "evaluation/plot.h"
#include "evaluation/plot_labels.h"
#include "evaluation/plot_style.h"

namespace oryx::evaluation {

namespace {

constexpr int kMaximumPoints = 1500;  // of a polyline: more than the pixels of its width serve no one

// The part of the picture that the axes enclose, and what it shows.
struct Frame {
  double left, top, width, height;
  Axis x, y;

  double bottom() const { return top + height; }
  double right() const { return left + width; }
  double at_x(double value) const { return left + width * x.place(value); }
  double at_y(double value) const { return top + height * (1 - y.place(value)); }
  bool holds(double px, double py) const {
    return px >= left - 0.5 && px <= right() + 0.5 && py >= top - 0.5 && py <= bottom() + 0.5;
  }
};

// Colours of what is no series: those of white paper, or the page's variables.
struct Ink {
  const char *line, *grid, *text, *muted;
};
constexpr Ink kPaper = {"#333", "#E4E4E4", "#111", "#666"};
constexpr Ink kPage = {"var(--axis)", "var(--grid)", "var(--ink)", "var(--muted)"};

std::string line(double x1, double y1, double x2, double y2, const char* colour, const char* dash = "") {
  return fmt::format(
      "<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\" style=\"stroke:{}\"{}/>\n", x1, x2, y1,
      y2, colour, *dash ? fmt::format(" stroke-dasharray=\"{}\"", dash) : "");
}

std::string text(double x, double y, const char* anchor, const char* colour, const std::string& content,
                 const std::string& more = "") {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\" style=\"fill:{}\"{}>{}</text>\n", x,
                     y, anchor, colour, more, escape_markup(content));
}

void draw_axes(std::string& svg, const Plot& plot, const Frame& frame, const Ink& ink) {
  for (const double tick : frame.y.ticks(static_cast<int>(std::clamp(frame.height / 45, 4.0, 8.0)))) {
    const double y = frame.at_y(tick);
    svg += line(frame.left, y, frame.right(), y, ink.grid);
    svg += text(frame.left - 8, y + 4, "end", ink.text, tick_text(tick));
  }
  for (const double tick : frame.x.ticks(static_cast<int>(std::clamp(frame.width / 70, 4.0, 9.0)))) {
    const double x = frame.at_x(tick);
    svg += line(x, frame.bottom(), x, frame.bottom() + 5, ink.line);
    svg += text(x, frame.bottom() + 19, "middle", ink.text, tick_text(tick));
  }
  svg += fmt::format(
      "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" fill=\"none\" "
      "style=\"stroke:{}\"/>\n",
      frame.left, frame.top, frame.width, frame.height, ink.line);
  if (plot.baseline) {
    svg += line(frame.left, frame.at_y(*plot.baseline), frame.right(), frame.at_y(*plot.baseline), ink.line);
  }
  svg += text(frame.left + frame.width / 2, frame.bottom() + 40, "middle", ink.text, plot.x_label);
  const double middle = frame.top + frame.height / 2;
  svg += text(16, middle, "middle", ink.text, plot.y_label,
              fmt::format(" transform=\"rotate(-90 16 {:.1f})\"", middle));
}

// Labels of markers that stand too close together take turns in two rows.
void draw_markers(std::string& svg, const Plot& plot, const Frame& frame, const Ink& ink) {
  double last = -1e9;
  bool raised = false;
  for (const Marker& marker : plot.markers) {
    const double x = frame.at_x(marker.x);
    raised = x - last < 8.0 * static_cast<double>(marker.label.size()) && !raised;
    last = x;
    svg += line(x, frame.top, x, frame.bottom(), ink.muted, "1 3");
    svg += text(x, frame.top - (raised ? 17 : 6), "middle", ink.muted, marker.label, " font-size=\"11\"");
  }
}

bool drawable(double value, const Plot& plot) {
  return std::isfinite(value) && (!plot.logarithmic_y || value > 0);
}

// The series' line, lifted where a value is missing.
std::string line_path(const Series& series, const Plot& plot, const Frame& frame, size_t stride) {
  std::string path;
  bool pen_down = false;
  for (size_t i = 0; i < series.x.size(); i += stride) {
    if (!drawable(series.y[i], plot)) {
      pen_down = false;
      continue;
    }
    path += fmt::format("{}{:.2f} {:.2f}", pen_down ? "L" : "M", frame.at_x(series.x[i]),
                        frame.at_y(series.y[i]));
    pen_down = true;
  }
  return path;
}

// There along the upper edge and back along the lower one, once for each run without a gap.
std::string band_path(const Series& series, const Plot& plot, const Frame& frame, size_t stride) {
  std::string path, back;
  const auto close = [&] {
    if (!back.empty()) path += back + "Z";
    back.clear();
  };
  for (size_t i = 0; i < series.x.size(); i += stride) {
    if (!drawable(series.low[i], plot) || !drawable(series.high[i], plot)) {
      close();
      continue;
    }
    const double x = frame.at_x(series.x[i]);
    path += fmt::format("{}{:.2f} {:.2f}", back.empty() ? "M" : "L", x, frame.at_y(series.high[i]));
    back.insert(0, fmt::format("L{:.2f} {:.2f}", x, frame.at_y(series.low[i])));
  }
  close();
  return path;
}

void draw_series(std::string& svg, const Series& series, const SeriesStyle& style, const Plot& plot,
                 const Frame& frame, const std::string& clip) {
  const size_t stride = std::max<size_t>(1, (series.x.size() + kMaximumPoints - 1) / kMaximumPoints);
  if (!series.low.empty() && !series.high.empty()) {
    svg += fmt::format(
        "<path class=\"band\" clip-path=\"url(#{})\" d=\"{}\" style=\"fill:{}\" fill-opacity=\"0.16\"/>\n",
        clip, band_path(series, plot, frame, stride), style.colour);
  }
  if (series.line) {
    svg +=
        fmt::format("<path class=\"line\" clip-path=\"url(#{})\" d=\"{}\" {} stroke-linejoin=\"round\"/>\n",
                    clip, line_path(series, plot, frame, stride), stroke_attributes(style));
  }
  if (!series.points) return;
  for (size_t i = 0; i < series.x.size(); ++i) {
    if (!drawable(series.y[i], plot)) continue;
    const double x = frame.at_x(series.x[i]), y = frame.at_y(series.y[i]);
    if (!frame.holds(x, y)) continue;  // those on its edge are drawn whole
    const std::string name = series.labels.empty() ? series.name : series.name + ": " + series.labels[i];
    svg += fmt::format("<g><title>{}</title>{}</g>\n", escape_markup(name), point_mark(style, x, y));
  }
}

// After all curves, so that labels stay clear of every point. One that finds no room is left to its point's
// title.
void draw_labels(std::string& svg, const Plot& plot, const Frame& frame, const Ink& ink) {
  LabelPlacer placer(frame.left, frame.top, frame.right(), frame.bottom());
  for (const Series& series : plot.series) {
    for (size_t i = 0; series.points && i < series.x.size(); ++i) {
      if (!drawable(series.y[i], plot)) continue;
      placer.add_point(frame.at_x(series.x[i]), frame.at_y(series.y[i]));
    }
  }
  for (size_t number = 0; number < plot.series.size(); ++number) {
    const Series& series = plot.series[number];
    for (size_t i = 0; i < series.labels.size(); ++i) {
      if (series.labels[i].empty() || !drawable(series.y[i], plot)) continue;
      if (!frame.holds(frame.at_x(series.x[i]), frame.at_y(series.y[i]))) continue;
      const auto place = placer.place(frame.at_x(series.x[i]), frame.at_y(series.y[i]), series.labels[i]);
      if (!place) continue;
      svg += text(place->x, place->y, place->anchor, ink.muted, series.labels[i],
                  fmt::format(" font-size=\"11\" data-label=\"{}\"", number));
    }
  }
}

// Axes, markers and curves; every series in a group of its own.
std::string draw_plot(const Plot& plot, const std::vector<SeriesStyle>& styles, const Frame& frame,
                      const Ink& ink, const std::string& id) {
  std::string svg = fmt::format(
      "<clipPath id=\"{}\"><rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\"/></clipPath>\n",
      id, frame.left, frame.top, frame.width, frame.height);
  draw_axes(svg, plot, frame, ink);
  draw_markers(svg, plot, frame, ink);
  // What others are compared with lies below them.
  for (const bool emphasised : {true, false}) {
    for (size_t i = 0; i < plot.series.size(); ++i) {
      if (plot.series[i].emphasised != emphasised) continue;
      svg += fmt::format("<g data-series=\"{}\">\n", i);
      draw_series(svg, plot.series[i], styles[i], plot, frame, id);
      svg += "</g>\n";
    }
  }
  draw_labels(svg, plot, frame, ink);
  return svg;
}

// To the right of the frame, one line a series.
void draw_legend(std::string& svg, const Plot& plot, const std::vector<SeriesStyle>& styles,
                 const Frame& frame) {
  const double left = frame.right() + 16;
  for (size_t i = 0; i < plot.series.size(); ++i) {
    const double y = frame.top + 10 + 20 * static_cast<double>(i);
    svg += legend_swatch(plot.series[i], styles[i], left, y) + "\n";
    svg += text(left + 42, y + 4, "start", kPaper.text, plot.series[i].name);
  }
}

}  // namespace

std::string to_svg(const Plot& plot, int width, int height) {
  return to_svg(std::vector{plot}, width, height);
}

std::string to_svg(const std::vector<Plot>& plots, int width, int height) {
  size_t longest = 0;
  for (const Plot& plot : plots) {
    for (const Series& series : plot.series) longest = std::max(longest, series.name.size());
  }
  // Seven pixels a letter at this size, at most half of the picture.
  const double legend = std::min(width / 2.0, 74 + 7.0 * static_cast<double>(longest));
  const int total = height * static_cast<int>(plots.size());
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} {1}\" "
      "font-family=\"sans-serif\" font-size=\"13\" fill=\"#111\">\n"
      "<title>{2}</title>\n<rect width=\"{0}\" height=\"{1}\" fill=\"#FFF\"/>\n",
      width, total, escape_markup(plots.empty() ? "" : plots[0].title));
  for (size_t i = 0; i < plots.size(); ++i) {
    const Plot& plot = plots[i];
    const auto [x_axis, y_axis] = plot_axes(plot);
    const Frame frame{74, 60, width - 74 - legend, height - 60.0 - 60, x_axis, y_axis};
    const std::vector<SeriesStyle> styles = series_styles(plot, /*variables=*/false);
    svg += fmt::format("<g transform=\"translate(0 {})\">\n", height * static_cast<int>(i));
    svg += text(frame.left, 24, "start", kPaper.text, plot.title, " font-size=\"16\" font-weight=\"bold\"");
    svg += draw_plot(plot, styles, frame, kPaper, fmt::format("frame-{}", i));
    draw_legend(svg, plot, styles, frame);
    svg += "</g>\n";
  }
  return svg + "</svg>\n";
}

std::string to_page_svg(const Plot& plot, const std::string& id, int width, int height) {
  const auto [x_axis, y_axis] = plot_axes(plot);
  const double top = plot.markers.empty() ? 10 : 30;
  const Frame frame{62, top, width - 62.0 - 14, height - top - 48, x_axis, y_axis};
  // What the page's script needs to read values off the curves.
  std::string svg = fmt::format(
      "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\" data-frame=\"{} {} {} {}\" data-x=\"{} {}\" "
      "data-y=\"{} {}\"{}{}>\n",
      width, height, escape_markup(plot.title), frame.left, frame.top, frame.width, frame.height,
      x_axis.low(), x_axis.high(), y_axis.low(), y_axis.high(), plot.logarithmic_y ? " data-logarithmic" : "",
      plot.binary_x ? " data-logarithmic-x" : "");
  return svg + draw_plot(plot, series_styles(plot, /*variables=*/true), frame, kPage, id) + "</svg>\n";
}

}  // namespace oryx::evaluation
