#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"
#include "evaluation/plot.h"

namespace oryx::evaluation {

namespace {

using Rgb = std::array<double, 3>;

// From white over the palette's blue to a dark one: lightness falls all the way, so print keeps the order.
constexpr std::array<Rgb, 4> kStops = {{{247, 250, 253}, {158, 202, 225}, {33, 113, 181}, {8, 38, 84}}};

Rgb colour_at(double value) {
  const double place = std::clamp(value, 0.0, 1.0) * (kStops.size() - 1);
  const size_t stop = std::min(static_cast<size_t>(place), kStops.size() - 2);
  const double share = place - static_cast<double>(stop);
  Rgb colour{};
  for (size_t i = 0; i < 3; ++i) colour[i] = kStops[stop][i] * (1 - share) + kStops[stop + 1][i] * share;
  return colour;
}

std::string text(double x, double y, const char* anchor, const std::string& fill, const std::string& content,
                 const std::string& more = "") {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\" style=\"fill:{}\"{}>{}</text>\n", x,
                     y, anchor, fill, more, escape_markup(content));
}

}  // namespace

std::string to_page_svg(const Heatmap& heatmap) {
  expect(heatmap.values.size() == heatmap.rows.size(), "heatmap '{}' has {} rows and {} names", heatmap.title,
         heatmap.values.size(), heatmap.rows.size());
  constexpr double kCell = 40, kRow = 26, kLeft = 58, kTop = 8;
  const double width = kLeft + kCell * static_cast<double>(heatmap.columns.size()) + 6;
  const double bottom = kTop + kRow * static_cast<double>(heatmap.rows.size());
  std::string svg = fmt::format(
      "<svg viewBox=\"0 0 {0:.0f} {1:.0f}\" width=\"{0:.0f}\" height=\"{1:.0f}\" role=\"img\" "
      "aria-label=\"{2}\">\n",
      width, bottom + 40, escape_markup(heatmap.title));
  for (size_t row = 0; row < heatmap.rows.size(); ++row) {
    expect(heatmap.values[row].size() == heatmap.columns.size(), "heatmap '{}' has {} columns and {} values",
           heatmap.title, heatmap.columns.size(), heatmap.values[row].size());
    const double y = kTop + kRow * static_cast<double>(row);
    svg += text(kLeft - 7, y + kRow / 2 + 4, "end", "var(--ink)", heatmap.rows[row]);
    for (size_t column = 0; column < heatmap.columns.size(); ++column) {
      const double x = kLeft + kCell * static_cast<double>(column);
      const double value = heatmap.values[row][column];
      if (!std::isfinite(value)) {
        svg += fmt::format(
            "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" "
            "style=\"fill:none;stroke:var(--grid)\"/>\n",
            x, y, kCell - 1.5, kRow - 1.5);
        continue;
      }
      const Rgb c = colour_at(value);
      svg += fmt::format(
          "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" "
          "style=\"fill:rgb({:.0f},{:.0f},{:.0f});stroke:var(--grid)\"/>\n",
          x, y, kCell - 1.5, kRow - 1.5, c[0], c[1], c[2]);
      const double lightness = 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2];
      svg += text(x + kCell / 2 - 1, y + kRow / 2 + 4, "middle", lightness > 140 ? "#111" : "#FFF",
                  fmt::format("{:.0f}", 100 * value));
    }
  }
  for (size_t column = 0; column < heatmap.columns.size(); ++column) {
    svg += text(kLeft + kCell * (static_cast<double>(column) + 0.5) - 1, bottom + 15, "middle", "var(--ink)",
                heatmap.columns[column]);
  }
  const double middle = kTop + (bottom - kTop) / 2;
  svg += text(kLeft + (width - kLeft) / 2, bottom + 33, "middle", "var(--muted)", heatmap.x_label);
  svg += text(13, middle, "middle", "var(--muted)", heatmap.y_label,
              fmt::format(" transform=\"rotate(-90 13 {:.1f})\"", middle));
  return svg + "</svg>\n";
}

}  // namespace oryx::evaluation
