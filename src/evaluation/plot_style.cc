#include <fmt/format.h>

#include <array>

#include "evaluation/plot.h"

namespace oryx::evaluation {

namespace {

// Okabe and Ito, "Color universal design" (2008), without the yellow that a white page swallows.
constexpr std::array<const char*, kPaletteSize> kColours = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                                            "#E69F00", "#56B4E9", "#000000"};
// Of the series that are not emphasised, in turn.
constexpr std::array<const char*, 6> kDashes = {"", "7 3", "2 3", "10 3 2 3", "14 4", "5 2 1 2 1 2"};

// A point of one of five shapes: each has about the area of the others.
std::string point_mark(int shape, double x, double y, const std::string& colour) {
  const std::string paint = fmt::format("style=\"fill:{0};stroke:{0}\" class=\"point\"", colour);
  switch (shape % 5) {
    case 0:
      return fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.6\" {}/>", x, y, paint);
    case 1:
      return fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"6.6\" height=\"6.6\" {}/>", x - 3.3,
                         y - 3.3, paint);
    case 2:
      return fmt::format("<path d=\"M{:.1f} {:.1f}l4.4 7.6h-8.8z\" {}/>", x, y - 4.8, paint);
    case 3:
      return fmt::format("<path d=\"M{:.1f} {:.1f}l4.6 4.6l-4.6 4.6l-4.6-4.6z\" {}/>", x, y - 4.6, paint);
    default:
      return fmt::format("<path d=\"M{:.1f} {:.1f}l4.4-7.6h-8.8z\" {}/>", x, y + 4.8, paint);
  }
}

}  // namespace

std::string palette_colour(int index) { return kColours[index % kPaletteSize]; }

std::vector<SeriesStyle> series_styles(const Plot& plot, bool variables) {
  std::vector<SeriesStyle> result;
  int next_dash = 0;
  for (size_t i = 0; i < plot.series.size(); ++i) {
    const Series& series = plot.series[i];
    const int colour = (series.colour < 0 ? static_cast<int>(i) : series.colour) % kPaletteSize;
    // A broad band needs no dash, so it does not use one up.
    const int dash = series.dash >= 0 ? series.dash : series.emphasised ? 0 : next_dash++;
    result.push_back({variables ? fmt::format("var(--c{})", colour) : palette_colour(colour),
                      kDashes[dash % kDashes.size()], dash, series.emphasised});
  }
  return result;
}

std::string stroke_attributes(const SeriesStyle& style) {
  // What others are compared with is a broad pale band: a curve that coincides with it stays visible on top.
  return fmt::format(R"(style="stroke:{}" stroke-width="{}"{}{} fill="none")", style.colour,
                     style.emphasised ? "5" : "1.7", style.emphasised ? R"( stroke-opacity="0.45")" : "",
                     style.dash.empty() ? "" : fmt::format(R"( stroke-dasharray="{}")", style.dash));
}

std::string point_mark(const SeriesStyle& style, double x, double y) {
  return point_mark(style.shape, x, y, style.colour);
}

std::string legend_swatch(const Series& series, const SeriesStyle& style, double left, double y) {
  std::string svg;
  if (series.line) {
    svg += fmt::format("<line x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\" {}/>", left, left + 34,
                       y, y, stroke_attributes(style));
  }
  if (series.points) svg += point_mark(style, series.line ? left + 17 : left + 7, y);
  return svg;
}

std::string escape_markup(std::string_view text) {
  std::string result;
  result.reserve(text.size());
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
      case '\'':
        result += "&#39;";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') {
          result += "\xEF\xBF\xBD";
        } else {
          result += c;
        }
    }
  }
  return result;
}

}  // namespace oryx::evaluation
