#include "cli/model_source.h"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "formats/safetensors.h"
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

std::string weights_checksum(const std::filesystem::path& directory) {
  const formats::TensorFiles files = formats::TensorFiles::open(directory.string());
  std::vector<std::string> names = files.names();
  std::sort(names.begin(), names.end());
  uLong checksum = crc32_z(0, nullptr, 0);
  const auto add = [&](const void* bytes, size_t size) {
    checksum = crc32_z(checksum, static_cast<const Bytef*>(bytes), size);
  };
  for (const std::string& name : names) {
    const at::Tensor tensor = files.tensor(name);
    add(name.data(), name.size());
    add(tensor.const_data_ptr(), tensor.nbytes());
  }
  return fmt::format("crc32 {:08x}", checksum);
}

}  // namespace oryx::cli
