// Line plots without a plotting library: a small SVG for reports and a few rows of text for terminals.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace oryx::evaluation {

struct Series {
  std::string name;          // in the legend
  std::vector<double> x, y;  // equally many; y not finite (or not positive on a logarithmic axis): a gap
  bool emphasised = false;   // drawn heavier: what the others are compared with
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
  // Curves are cut off beyond it; by default the range of all values.
  std::optional<std::pair<double, double>> y_range;
};

// One axis: from a value to its place between 0 and 1, with round numbers to label.
class Axis {
 public:
  // A range of one value is widened. Both ends must be finite, and positive on a logarithmic axis.
  Axis(double low, double high, bool logarithmic);

  double low() const { return low_; }
  double high() const { return high_; }
  double place(double value) const;
  // Round numbers inside the range, at most `count` of them and at least one where the range allows.
  std::vector<double> ticks(int count) const;

 private:
  double low_, high_;
  bool logarithmic_;
};

// "1500", "0.25", "1e+07": as short as the number allows.
std::string tick_text(double value);

// Axes that hold all the series. Throws Error when there is no finite value to show.
std::pair<Axis, Axis> plot_axes(const Plot& plot);

// A self-contained picture. Series differ in colour (Okabe and Ito's palette, told apart by colour-blind
// readers) and in their dashes (told apart in print).
std::string to_svg(const Plot& plot, int width = 960, int height = 560);

// Rows of text at most `columns` wide: Braille dots in ANSI colours of the same palette, or without `colour`
// one letter a series.
std::string to_terminal(const Plot& plot, int columns, int rows, bool colour);

}  // namespace oryx::evaluation
