#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "evaluation/plot.h"

namespace oryx::evaluation {

namespace {

// The palette of the SVG in the 256 colours of terminals; each reads on black and on white.
constexpr std::array<int, 7> kColours = {32, 166, 35, 175, 178, 74, 244};

// A character cell holds 2 × 4 dots, each a bit of the code points from U+2800.
constexpr int kDotColumns = 2, kDotRows = 4;
constexpr std::array<std::array<uint8_t, kDotRows>, kDotColumns> kDotBits = {
    {{0x01, 0x02, 0x04, 0x40}, {0x08, 0x10, 0x20, 0x80}}};

// What a series is drawn with where there are no colours to tell the dots of one from another's.
char letter(int series) { return static_cast<char>('a' + series % 26); }

class Canvas {
 public:
  Canvas(int columns, int rows)
      : columns_(columns), rows_(rows), dots_(columns * rows), owner_(columns * rows, -1) {}

  int width() const { return columns_ * kDotColumns; }
  int height() const { return rows_ * kDotRows; }

  // A dot takes its cell's colour with it: the last series to touch a cell owns it.
  void dot(int x, int y, int series) {
    if (x < 0 || x >= width() || y < 0 || y >= height()) return;
    const int cell = (y / kDotRows) * columns_ + x / kDotColumns;
    dots_[cell] |= kDotBits[x % kDotColumns][y % kDotRows];
    owner_[cell] = series;
  }

  void line(int x0, int y0, int x1, int y1, int series) {
    const int steps = std::max({1, std::abs(x1 - x0), std::abs(y1 - y0)});
    for (int i = 0; i <= steps; ++i) dot(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps, series);
  }

  std::string row(int row, bool colour) const {
    std::string text;
    int current = -1;
    for (int column = 0; column < columns_; ++column) {
      const int cell = row * columns_ + column;
      const int wanted = dots_[cell] == 0 ? -1 : owner_[cell];
      if (colour && wanted != current) {
        text += wanted < 0 ? "\x1b[0m" : fmt::format("\x1b[38;5;{}m", kColours[wanted % kColours.size()]);
        current = wanted;
      }
      if (!colour) {
        text += wanted < 0 ? ' ' : letter(wanted);
        continue;
      }
      const uint8_t bits = dots_[cell];  // U+2800 + bits in UTF-8
      text += {'\xE2', static_cast<char>(0xA0 | bits >> 6), static_cast<char>(0x80 | (bits & 0x3F))};
    }
    return current < 0 ? text : text + "\x1b[0m";
  }

 private:
  int columns_, rows_;
  std::vector<uint8_t> dots_;
  std::vector<int> owner_;
};

// The mean of the series in each column of dots that it crosses: a terminal is far coarser than the data.
void draw(Canvas& canvas, const Plot& plot, size_t index, const Axis& x_axis, const Axis& y_axis) {
  const Series& series = plot.series[index];
  std::vector<double> sum(canvas.width(), 0.0);
  std::vector<int> count(canvas.width(), 0);
  for (size_t i = 0; i < series.x.size(); ++i) {
    if (!std::isfinite(series.y[i]) || (plot.logarithmic_y && series.y[i] <= 0)) continue;
    const int column =
        std::clamp(static_cast<int>(x_axis.place(series.x[i]) * canvas.width()), 0, canvas.width() - 1);
    sum[column] += y_axis.place(series.y[i]);
    ++count[column];
  }
  int last_x = -1, last_y = 0;
  for (int x = 0; x < canvas.width(); ++x) {
    if (count[x] == 0) continue;
    const double place =
        std::clamp(sum[x] / count[x], -1.0, 2.0);  // far outside is outside: keep the integers small
    const int y = static_cast<int>(std::lround((1 - place) * (canvas.height() - 1)));
    if (last_x >= 0) canvas.line(last_x, last_y, x, y, static_cast<int>(index));
    canvas.dot(x, y, static_cast<int>(index));
    last_x = x;
    last_y = y;
  }
}

// Tick texts below the frame, each centred under its place as far as there is room.
std::string x_labels(const Axis& axis, int columns) {
  std::string line(columns, ' ');
  int next_free = 0;
  for (const double tick : axis.ticks(std::max(2, columns / 12))) {
    const std::string text = tick_text(tick);
    const int size = static_cast<int>(text.size());
    const int begin = std::clamp(static_cast<int>(axis.place(tick) * (columns - 1)) - size / 2, 0,
                                 std::max(0, columns - size));
    if (begin < next_free || begin + size > columns) continue;
    line.replace(begin, size, text);
    next_free = begin + size + 1;
  }
  line.erase(line.find_last_not_of(' ') + 1);
  return line;
}

}  // namespace

std::string to_terminal(const Plot& plot, int columns, int rows, bool colour) {
  const auto [x_axis, y_axis] = plot_axes(plot);
  // The label of a tick stands in the row that its value falls into.
  std::vector<std::string> labels(rows);
  size_t margin = 0;
  for (const double tick : y_axis.ticks(std::max(2, rows / 3))) {
    std::string& label = labels[std::clamp(static_cast<int>((1 - y_axis.place(tick)) * rows), 0, rows - 1)];
    label = tick_text(tick);
    margin = std::max(margin, label.size());
  }
  const int inner = std::max(10, columns - static_cast<int>(margin) - 2);
  Canvas canvas(inner, rows);
  for (size_t i = 0; i < plot.series.size(); ++i) draw(canvas, plot, i, x_axis, y_axis);

  std::string text = plot.title + "\n";
  for (int row = 0; row < rows; ++row) {
    text += fmt::format("{:>{}} {}{}\n", labels[row], margin, labels[row].empty() ? "│" : "┤",
                        canvas.row(row, colour));
  }
  std::string frame;
  for (int i = 0; i < inner; ++i) frame += "─";
  const std::string indent(margin + 2, ' ');
  text += fmt::format("{} └{}\n", std::string(margin, ' '), frame);
  text += indent + x_labels(x_axis, inner) + "\n";
  text += fmt::format("{}{} · {}\n", indent, plot.x_label, plot.y_label);
  for (size_t i = 0; i < plot.series.size(); ++i) {
    text += colour ? fmt::format("{}\x1b[38;5;{}m━━\x1b[0m {}\n", indent, kColours[i % kColours.size()],
                                 plot.series[i].name)
                   : fmt::format("{}{} {}\n", indent, letter(static_cast<int>(i)), plot.series[i].name);
  }
  return text;
}

}  // namespace oryx::evaluation
