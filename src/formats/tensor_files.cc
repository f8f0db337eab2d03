#include <filesystem>

#include "base/error.h"
#include "base/nearest_name.h"
#include "formats/file.h"
#include "formats/json.h"
#include "formats/safetensors.h"

namespace oryx::formats {
namespace {

namespace fs = std::filesystem;

const std::string& shard_name(const std::string& index, const Entry& entry) {
  const std::string* name = entry.value.as<std::string>();
  const bool plain =
      name && !name->empty() && *name != "." && *name != ".." && name->find('/') == std::string::npos;
  expect(plain, "{}: expected a file name for tensor {}, got {}", index, entry.key, entry.value.text());
  return *name;
}

}  // namespace

TensorFiles TensorFiles::open(const std::string& path, const std::string& stem) {
  TensorFiles files;
  files.path_ = path;
  const fs::path whole = fs::is_directory(path) ? fs::path(path) / (stem + ".safetensors") : fs::path(path);
  const fs::path index = fs::path(path) / (stem + ".safetensors.index.json");
  if (fs::exists(whole)) {
    const auto file = std::make_shared<SafetensorsFile>(whole.string());
    for (const std::string& name : file->names()) files.add(name, file);
    return files;
  }
  expect(fs::exists(path), "{}: no such file or directory", path);
  expect(fs::exists(index), "{} holds neither {}.safetensors nor {}.safetensors.index.json", path, stem,
         stem);
  const Table table = read_json(index.string());
  const Value* map = table.find("weight_map");
  expect(map && map->as<Table>(), "{}: expected an object weight_map", index.string());
  std::map<std::string, std::shared_ptr<SafetensorsFile>> shards;
  for (const Entry& entry : map->as<Table>()->entries) {
    const std::string name = shard_name(index.string(), entry);
    std::shared_ptr<SafetensorsFile>& shard = shards[name];
    if (!shard) shard = std::make_shared<SafetensorsFile>((fs::path(path) / name).string());
    expect(shard->contains(entry.key), "{} holds no tensor {}, which {} places there", shard->path(),
           entry.key, index.string());
    files.add(entry.key, shard);
  }
  return files;
}

void TensorFiles::add(const std::string& name, const std::shared_ptr<SafetensorsFile>& file) {
  names_.push_back(name);
  files_of_names_.emplace(name, file);
}

const SafetensorsFile& TensorFiles::file_of(std::string_view name) const {
  const auto found = files_of_names_.find(name);
  if (found == files_of_names_.end()) {
    const std::string nearest = nearest_name(name, names_);
    fail("{} holds no tensor {}{}", path_, name,
         nearest.empty() ? "" : fmt::format("; the nearest is {}", nearest));
  }
  return *found->second;
}

void write_tensor_files(const std::string& directory, const NamedTensors& tensors, const Metadata& metadata,
                        const std::string& stem, uint64_t shard_bytes) {
  std::vector<NamedTensors> shards(1);
  uint64_t total = 0, filled = 0;
  for (const auto& named : tensors) {
    expect(named.second.defined(), "{}: tensor \"{}\" has no plain values", directory, named.first);
    const uint64_t bytes = named.second.nbytes();
    if (filled > 0 && filled + bytes > shard_bytes) {
      shards.emplace_back();
      filled = 0;
    }
    shards.back().push_back(named);
    filled += bytes;
    total += bytes;
  }
  const fs::path whole = fs::path(directory) / (stem + ".safetensors");
  const fs::path index = fs::path(directory) / (stem + ".safetensors.index.json");
  const fs::path& other = shards.size() == 1 ? index : whole;
  expect(!fs::exists(other), "cannot write {} into {}: it holds {} already", stem, directory,
         other.filename().string());
  if (shards.size() == 1) {
    write_safetensors(whole.string(), tensors, metadata);
    return;
  }
  Table weight_map;
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = fmt::format("{}-{:05}-of-{:05}.safetensors", stem, i + 1, shards.size());
    write_safetensors((fs::path(directory) / name).string(), shards[i], metadata);
    for (const auto& named : shards[i]) weight_map.set(named.first, {name, {}});
  }
  Table table;
  Table sizes;
  sizes.set("total_size", {static_cast<int64_t>(total), {}});
  table.set("metadata", {std::move(sizes), {}});
  table.set("weight_map", {std::move(weight_map), {}});
  write_file_atomic(index.string(), to_json(table, 2) + "\n");
}

}  // namespace oryx::formats
