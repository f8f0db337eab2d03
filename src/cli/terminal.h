// What standard output can show.
#pragma once

#include <string>

#include "schedule/spans.h"

namespace oryx::cli {

// "always", "never", or "auto": where standard output is a terminal and NO_COLOR (no-color.org) is not set.
bool use_colour(const std::string& choice);

// The width of the terminal on standard output, or 100.
int terminal_columns();

// Text of one mixer: attention bold blue, linear orange, which colour-blind readers tell apart and which read
// on dark and on light; the weight tells them apart without any colour. colour_end() closes both.
std::string colour_of(schedule::Mode mode);
std::string colour_end();

// The two names in their colours.
std::string colour_legend();

}  // namespace oryx::cli
