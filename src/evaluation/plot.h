// Line plots without a plotting library: a small SVG for reports and a few rows of text for terminals.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace oryx::evaluation {

enum class Scale {
  linear,
  logarithmic,
  binary,  // logarithmic, with powers of two for ticks
};

struct Series {
  std::string name;          // in the legend
  std::vector<double> x, y;  // equally many; y not finite (or not positive on a logarithmic axis): a gap
  bool emphasised = false;   // drawn heavier: what the others are compared with
  // A pale band around y, say of confidence: as many as y, or none.
  std::vector<double> low = {}, high = {};
  // Numbers of the palette and of its dashes and point shapes, for series that belong together; -1: in turn.
  int colour = -1, dash = -1;
  bool line = true, points = false;
  std::vector<std::string> labels = {};  // of the points: one each, or none
};

// A vertical line.
struct Marker {
  double x = 0;
  std::string label;
};

struct Plot {
  std::string title, x_label, y_label;
  std::vector<Series> series;
  std::vector<Marker> markers;
  bool logarithmic_y = false;
  bool binary_x = false;  // places are powers of two or lie between them: the axis is one of log2
  // Curves are cut off beyond them; by default the range of all values.
  std::optional<std::pair<double, double>> x_range = {}, y_range = {};
  std::optional<double> baseline = {};  // a horizontal line, say at zero, always in view
};

// One axis: from a value to its place between 0 and 1, with round numbers to label.
class Axis {
 public:
  // A range of one value is widened. Both ends must be finite, and positive on an axis that is not linear.
  Axis(double low, double high, Scale scale);

  double low() const { return low_; }
  double high() const { return high_; }
  double place(double value) const;
  // Round numbers inside the range, at most `count` of them and at least one where the range allows.
  std::vector<double> ticks(int count) const;

 private:
  double low_, high_;
  Scale scale_;
};

// "1500", "0.25", "1e+07": as short as the number allows.
std::string tick_text(double value);

// Axes that hold all the series. Throws Error when there is no finite value to show.
std::pair<Axis, Axis> plot_axes(const Plot& plot);

// What "&", "<", ">" and quotes are in markup; control characters, which markup cannot hold, become U+FFFD.
std::string escape_markup(std::string_view text);

// How a series looks, told apart by colour-blind readers (Okabe and Ito's palette) and in print (dashes,
// shapes of points).
struct SeriesStyle {
  std::string colour;  // a CSS colour
  std::string dash;    // of SVG's stroke-dasharray; empty: a solid line
  int shape = 0;       // of points
  bool emphasised = false;
};
constexpr int kPaletteSize = 7;

// The styles of a plot's series. With `variables` colours are var(--c0) … var(--c6), which a page defines for
// its light and its dark theme; palette_colour(n) are those for white paper.
std::vector<SeriesStyle> series_styles(const Plot& plot, bool variables);
std::string palette_colour(int index);

// A line and a point as the legend shows them, 34 × 12 pixels from `left` and around `y`.
std::string legend_swatch(const Series& series, const SeriesStyle& style, double left, double y);

// A self-contained picture.
std::string to_svg(const Plot& plot, int width = 960, int height = 560);
// Several, one below the other, `height` each.
std::string to_svg(const std::vector<Plot>& plots, int width = 960, int height = 560);
// For a page that has title and legend in its own text: colours are variables of the page, and every series
// is a group that the page's script finds by its number. `id` must be unique in the page.
std::string to_page_svg(const Plot& plot, const std::string& id, int width, int height);

// Fractions between 0 and 1 in a grid, one row of cells a row.
struct Heatmap {
  std::string title, x_label, y_label;
  std::vector<std::string> columns, rows;
  std::vector<std::vector<double>> values;  // [rows][columns]; not finite: an empty cell
};

// Cells hold their value in per cent, on a scale from white to dark blue that keeps its order in grey.
std::string to_page_svg(const Heatmap& heatmap);

// Rows of text at most `columns` wide: Braille dots in ANSI colours of the same palette, or without `colour`
// one letter a series.
std::string to_terminal(const Plot& plot, int columns, int rows, bool colour);

}  // namespace oryx::evaluation
