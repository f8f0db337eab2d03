#include "cli/model_source.h"

#include <filesystem>

#include "base/error.h"
#include "formats/toml.h"
#include "model/weights.h"

namespace oryx::cli {

model::ModelConfig read_model_config(const std::string& source, const std::vector<std::string>& overrides) {
  expect(std::filesystem::exists(source), "no such model directory or recipe: {}", source);
  if (std::filesystem::is_directory(source)) {
    if (!overrides.empty())
      fail_usage("{} is a model: '{}' can only override a recipe", source, overrides[0]);
    return model::load_config(source);
  }
  Table recipe = formats::read_recipe(source);
  formats::apply_overrides(recipe, overrides);
  return model::ModelConfig::read(section(recipe, "model"), "model");
}

}  // namespace oryx::cli
