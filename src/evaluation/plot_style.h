// What the drawers of SVG share beside plot.h.
#pragma once

#include <string>

#include "evaluation/plot.h"

namespace oryx::evaluation {

// Attributes of a line in a series' style.
std::string stroke_attributes(const SeriesStyle& style);

std::string point_mark(const SeriesStyle& style, double x, double y);

}  // namespace oryx::evaluation
