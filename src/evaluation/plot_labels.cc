#include "evaluation/plot_labels.h"

#include <algorithm>
#include <array>
#include <string_view>

namespace oryx::evaluation {

namespace {
constexpr double kPoint = 4.5;                 // half the extent of a point
constexpr double kLetter = 6.4, kHeight = 11;  // of the label's type, about
}  // namespace

void LabelPlacer::add_point(double x, double y) {
  taken_.push_back({x - kPoint, y - kPoint, x + kPoint, y + kPoint});
}

std::optional<LabelPlacer::Place> LabelPlacer::place(double x, double y, const std::string& text) {
  const double width = kLetter * static_cast<double>(text.size());
  const std::array<Place, 8> candidates = {{{x + 7, y - 5, "start"},
                                            {x - 7, y - 5, "end"},
                                            {x + 7, y + 13, "start"},
                                            {x - 7, y + 13, "end"},
                                            {x + 8, y + 4, "start"},
                                            {x - 8, y + 4, "end"},
                                            {x, y - 9, "middle"},
                                            {x, y + 18, "middle"}}};
  for (const Place& candidate : candidates) {
    const std::string_view anchor = candidate.anchor;
    const double left = candidate.x - (anchor == "start" ? 0 : anchor == "end" ? width : width / 2);
    const Box box{left, candidate.y - kHeight + 2, left + width, candidate.y + 2};
    const bool is_inside = box.left >= frame_.left && box.right <= frame_.right && box.top >= frame_.top &&
                           box.bottom <= frame_.bottom;
    if (!is_inside ||
        std::any_of(taken_.begin(), taken_.end(), [&](const Box& other) { return box.overlaps(other); })) {
      continue;
    }
    taken_.push_back(box);
    return candidate;
  }
  return std::nullopt;
}

}  // namespace oryx::evaluation
