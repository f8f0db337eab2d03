#include "cli/model_source.h"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "formats/file.h"
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
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::filesystem::path& path = entry.path();
    // model.safetensors or its shards; a checkpoint's optimizer lies beside them.
    if (path.extension() == ".safetensors" && path.filename().string().starts_with("model"))
      files.push_back(path.string());
  }
  expect(!files.empty(), "{}: holds no model.safetensors", directory.string());
  std::sort(files.begin(), files.end());
  uLong checksum = crc32_z(0, nullptr, 0);
  for (const std::string& file : files) {
    const formats::MappedFile bytes(file);
    checksum = crc32_z(checksum, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size());
  }
  return fmt::format("crc32 {:08x}", checksum);
}

}  // namespace oryx::cli
