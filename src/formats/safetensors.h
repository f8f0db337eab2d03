// Safetensors files: https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header,
// the tensors' bytes, little endian). Types: F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace oryx::formats {

class MappedFile;

using Metadata = std::map<std::string, std::string>;
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

struct TensorInfo {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // bytes, from the end of the header
};

// A file read by mapping. Opening checks the whole header: its length, the JSON, every type and shape, and
// that the tensors fill the rest of the file without hole or overlap; Error names the file and the tensor.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const;
  const Metadata& metadata() const { return metadata_; }
  const std::vector<std::string>& names() const { return names_; }  // in the order of their bytes
  bool contains(std::string_view name) const { return infos_.contains(name); }

  // Error for a name the file does not hold.
  const TensorInfo& info(std::string_view name) const;

  // A CPU tensor on the mapped bytes themselves, which it keeps mapped beyond the life of this object.
  // Treat it as read-only: a write stays in this process and is seen by every other tensor of this object.
  // Tensors whose bytes are not aligned for their type are copied.
  at::Tensor tensor(std::string_view name) const;

 private:
  std::shared_ptr<MappedFile> file_;
  uint64_t data_offset_ = 0;
  Metadata metadata_;
  std::vector<std::string> names_;
  std::map<std::string, TensorInfo, std::less<>> infos_;
};

// Writes a file that appears whole or not at all (formats/file.h). Tensors may lie on any device and have any
// strides; they are moved and written one after the other. Error for equal names and for other types.
void write_safetensors(const std::string& path, const NamedTensors& tensors, const Metadata& metadata = {});

// The first bytes of a file, length and JSON, padded with blanks to a multiple of 8 and to `minimum_size`.
std::string safetensors_header(const std::vector<std::pair<std::string, TensorInfo>>& infos,
                               const Metadata& metadata, size_t minimum_size = 0);

// The tensors of a directory: STEM.safetensors, or the shards that STEM.safetensors.index.json lists.
class TensorFiles {
 public:
  // `path` may also be a single safetensors file. Error where neither form is there, where the index names a
  // file outside the directory, and where a shard lacks a tensor that the index gives it.
  static TensorFiles open(const std::string& path, const std::string& stem = "model");

  const std::vector<std::string>& names() const { return names_; }
  bool contains(std::string_view name) const { return files_of_names_.contains(name); }
  const TensorInfo& info(std::string_view name) const { return file_of(name).info(name); }
  at::Tensor tensor(std::string_view name) const { return file_of(name).tensor(name); }

 private:
  const SafetensorsFile& file_of(std::string_view name) const;
  void add(const std::string& name, const std::shared_ptr<SafetensorsFile>& file);

  std::string path_;
  std::vector<std::string> names_;
  std::map<std::string, std::shared_ptr<SafetensorsFile>, std::less<>> files_of_names_;
};

inline constexpr uint64_t kDefaultShardBytes = uint64_t{5} << 30;

// STEM.safetensors in an existing directory, or STEM-00001-of-0000N.safetensors and their index where the
// tensors exceed `shard_bytes`; a tensor is never split. Error where the directory holds STEM in the other
// form already. Several files do not appear at once: for that, write into an AtomicDirectory.
void write_tensor_files(const std::string& directory, const NamedTensors& tensors,
                        const Metadata& metadata = {}, const std::string& stem = "model",
                        uint64_t shard_bytes = kDefaultShardBytes);

}  // namespace oryx::formats
