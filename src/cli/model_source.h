// What a command is given where it takes either a model directory or a recipe.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "model/config.h"

namespace oryx::cli {

// The config of a model directory, or of a recipe file after section.key=value overrides.
model::ModelConfig read_model_config(const std::string& source, const std::vector<std::string>& overrides);

// "crc32 1c291ca3" over the names and values of the weights of a model directory, however they are cut into
// files: about a second for a gigabyte. It tells the states of a model in training apart; it is no protection
// against forgery. Throws Error where the directory holds no weights.
std::string weights_checksum(const std::filesystem::path& directory);

}  // namespace oryx::cli
