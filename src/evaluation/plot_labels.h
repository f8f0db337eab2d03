// Places for the labels of points: beside their point, within the frame, on no other point or label.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace oryx::evaluation {

class LabelPlacer {
 public:
  // What labels must stay within.
  LabelPlacer(double left, double top, double right, double bottom) : frame_{left, top, right, bottom} {}

  // A point that no label may cover. All points come before the first label.
  void add_point(double x, double y);

  struct Place {
    double x, y;         // of the text's anchor on its baseline
    const char* anchor;  // SVG's text-anchor
  };
  // The first free place around the point; nothing where it is crowded all around.
  std::optional<Place> place(double x, double y, const std::string& text);

 private:
  struct Box {
    double left, top, right, bottom;
    bool overlaps(const Box& other) const {
      return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
    }
  };

  Box frame_;
  std::vector<Box> taken_;
};

}  // namespace oryx::evaluation
