// results.json for people.
#pragma once

#include <string>

#include "base/value.h"

namespace oryx::cli {

// One row a metric, one column a schedule; fractions in per cent, ± the standard error; averages and what was
// spent below. Columns that do not fit side by side follow in a table of their own.
std::string evaluation_table(const Table& results, int columns);

}  // namespace oryx::cli
