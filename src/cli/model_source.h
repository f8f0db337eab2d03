// What a command is given where it takes either a model directory or a recipe.
#pragma once

#include <string>
#include <vector>

#include "model/config.h"

namespace oryx::cli {

// The config of a model directory, or of a recipe file after section.key=value overrides.
model::ModelConfig read_model_config(const std::string& source, const std::vector<std::string>& overrides);

}  // namespace oryx::cli
