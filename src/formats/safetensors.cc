#include "formats/safetensors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <set>

#include "base/error.h"
#include "base/nearest_name.h"
#include "formats/file.h"
#include "formats/json.h"

namespace oryx::formats {
namespace {

static_assert(std::endian::native == std::endian::little,
              "safetensors bytes are used as they lie in the file");

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaximumHeader = 100'000'000;  // as the format's own reader
constexpr size_t kMaximumDimensions = 64;

constexpr std::pair<std::string_view, at::ScalarType> kTypes[] = {
    {"F64", at::kDouble}, {"F32", at::kFloat},  {"F16", at::kHalf},   {"BF16", at::kBFloat16},
    {"I64", at::kLong},   {"I32", at::kInt},    {"I16", at::kShort},  {"I8", at::kChar},
    {"U64", at::kUInt64}, {"U32", at::kUInt32}, {"U16", at::kUInt16}, {"U8", at::kByte},
    {"BOOL", at::kBool},
};

// Reads one header; every message starts with the file's name.
class HeaderReader {
 public:
  HeaderReader(const std::string& path, const std::byte* bytes, uint64_t size) : path_(path) {
    expect(size >= kLengthBytes, "{}: expected a safetensors file, got {} bytes", path, size);
    std::memcpy(&length_, bytes, kLengthBytes);
    expect(length_ <= kMaximumHeader && length_ <= size - kLengthBytes,
           "{}: the header claims {} bytes, but {} follow: truncated, or no safetensors file", path, length_,
           size - kLengthBytes);
    data_size_ = size - kLengthBytes - length_;
    const std::string_view text(reinterpret_cast<const char*>(bytes) + kLengthBytes, length_);
    expect(text.starts_with('{'), "{}: the header does not start with {{: no safetensors file", path);
    header_ = parse_json(text, path);
  }

  uint64_t data_offset() const { return kLengthBytes + length_; }

  void read(Metadata& metadata, std::map<std::string, TensorInfo, std::less<>>& infos) const {
    for (const Entry& entry : std::get<Table>(header_.data).entries) {
      const Table* fields = entry.value.as<Table>();
      expect(fields, "{}: expected an object for \"{}\", got {}", path_, entry.key, entry.value.text());
      if (entry.key == "__metadata__") {
        read_metadata(*fields, metadata);
      } else {
        infos.emplace(entry.key, read_info(entry.key, *fields));
      }
    }
  }

  // Names by position; the tensors must fill the data exactly.
  std::vector<std::string> order(const std::map<std::string, TensorInfo, std::less<>>& infos) const {
    std::vector<std::pair<const std::string*, const TensorInfo*>> sorted;
    for (const auto& [name, info] : infos) sorted.emplace_back(&name, &info);
    std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
      return std::tie(a.second->begin, a.second->end, *a.first) <
             std::tie(b.second->begin, b.second->end, *b.first);
    });
    std::vector<std::string> names;
    uint64_t position = 0;
    for (const auto& [name, info] : sorted) {
      expect(info->begin == position,
             "{}: expected tensor \"{}\" to begin at byte {}, got {}: a hole or an overlap", path_, *name,
             position, info->begin);
      position = info->end;
      names.push_back(*name);
    }
    expect(position == data_size_,
           "{}: the tensors take {} bytes, but {} follow the header: truncated or damaged", path_, position,
           data_size_);
    return names;
  }

 private:
  void read_metadata(const Table& fields, Metadata& metadata) const {
    for (const Entry& entry : fields.entries) {
      const std::string* text = entry.value.as<std::string>();
      expect(text, "{}: expected a string for metadata \"{}\", got {}", path_, entry.key, entry.value.text());
      metadata.emplace(entry.key, *text);
    }
  }

  TensorInfo read_info(const std::string& name, const Table& fields) const {
    TensorInfo info{read_type(name, field(name, fields, "dtype")), read_integers(name, fields, "shape")};
    expect(info.shape.size() <= kMaximumDimensions,
           "{}: tensor \"{}\" has {} dimensions, expected at most {}", path_, name, info.shape.size(),
           kMaximumDimensions);
    const std::vector<int64_t> offsets = read_integers(name, fields, "data_offsets");
    expect(fields.entries.size() == 3,
           "{}: tensor \"{}\" has fields other than dtype, shape and data_offsets", path_, name);
    expect(offsets.size() == 2 && offsets[0] <= offsets[1],
           "{}: tensor \"{}\" has data_offsets {}, expected [begin, end]", path_, name,
           field(name, fields, "data_offsets").text());
    info.begin = static_cast<uint64_t>(offsets[0]);
    info.end = static_cast<uint64_t>(offsets[1]);
    expect(info.end <= data_size_,
           "{}: tensor \"{}\" ends at byte {}, past the file's {} bytes of data: truncated", path_, name,
           info.end, data_size_);
    // Strides multiply the sizes with empty dimensions counted as 1, so that product must fit too.
    int64_t elements = 1, extent = static_cast<int64_t>(c10::elementSize(info.dtype));
    for (int64_t size : info.shape) {
      const bool overflow = __builtin_mul_overflow(extent, std::max<int64_t>(size, 1), &extent);
      expect(!overflow, "{}: the shape of tensor \"{}\" overflows 64 bits", path_, name);
      elements *= size;
    }
    const uint64_t bytes = static_cast<uint64_t>(elements) * c10::elementSize(info.dtype);
    expect(bytes == info.end - info.begin,
           "{}: tensor \"{}\" has {} bytes, but its shape and type ask for {}", path_, name,
           info.end - info.begin, bytes);
    return info;
  }

  const Value& field(const std::string& name, const Table& fields, std::string_view key) const {
    const Value* value = fields.find(key);
    expect(value, "{}: tensor \"{}\" has no {}", path_, name, key);
    return *value;
  }

  at::ScalarType read_type(const std::string& name, const Value& value) const {
    if (const std::string* text = value.as<std::string>()) {
      for (const auto& [type_name, type] : kTypes) {
        if (*text == type_name) return type;
      }
    }
    fail(
        "{}: tensor \"{}\" has dtype {}, expected one of F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL",
        path_, name, value.text());
  }

  std::vector<int64_t> read_integers(const std::string& name, const Table& fields,
                                     std::string_view key) const {
    const Value& value = field(name, fields, key);
    std::vector<int64_t> numbers;
    if (const Array* array = value.as<Array>()) {
      for (const Value& item : *array) {
        const int64_t* number = item.as<int64_t>();
        if (number && *number >= 0) numbers.push_back(*number);
      }
      if (numbers.size() == array->size()) return numbers;
    }
    fail("{}: tensor \"{}\" has {} {}, expected integers of at least 0", path_, name, key, value.text());
  }

  const std::string& path_;
  uint64_t length_ = 0, data_size_ = 0;
  Value header_;
};

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(std::make_shared<MappedFile>(path)) {
  const HeaderReader header(file_->path(), file_->data(), file_->size());
  data_offset_ = header.data_offset();
  header.read(metadata_, infos_);
  names_ = header.order(infos_);
}

const std::string& SafetensorsFile::path() const { return file_->path(); }

const TensorInfo& SafetensorsFile::info(std::string_view name) const {
  const auto found = infos_.find(name);
  if (found == infos_.end()) {
    const std::string nearest = nearest_name(name, names_);
    fail("{} holds no tensor {}{}", path(), name,
         nearest.empty() ? "" : fmt::format("; the nearest is {}", nearest));
  }
  return found->second;
}

at::Tensor SafetensorsFile::tensor(std::string_view name) const {
  const TensorInfo& info = this->info(name);
  std::byte* bytes = file_->data() + data_offset_ + info.begin;
  if (info.dtype == at::kBool) {
    // Any other byte would be undefined behaviour as a C++ bool.
    const bool valid =
        std::all_of(bytes, bytes + (info.end - info.begin), [](std::byte b) { return b <= std::byte{1}; });
    expect(valid, "{}: tensor \"{}\" of type BOOL holds bytes other than 0 and 1", path(), name);
  }
  const at::TensorOptions options = at::TensorOptions().dtype(info.dtype);
  if (info.begin == info.end) return at::empty(info.shape, options);
  if (reinterpret_cast<uintptr_t>(bytes) % c10::elementSize(info.dtype) != 0) {
    at::Tensor copy = at::empty(info.shape, options);
    std::memcpy(copy.data_ptr(), bytes, info.end - info.begin);
    return copy;
  }
  return at::from_blob(
      bytes, info.shape, [file = file_](void*) {}, options);
}

std::string safetensors_header(const std::vector<std::pair<std::string, TensorInfo>>& infos,
                               const Metadata& metadata, size_t minimum_size) {
  Table header;
  if (!metadata.empty()) {
    Table table;
    for (const auto& [key, text] : metadata) table.entries.push_back({key, {text, {}}});
    header.entries.push_back({"__metadata__", {std::move(table), {}}});
  }
  const auto integers = [](const auto& numbers) {
    Array array;
    for (const auto number : numbers) array.push_back({static_cast<int64_t>(number), {}});
    return Value{std::move(array), {}};
  };
  for (const auto& [name, info] : infos) {
    const auto type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                   [&](const auto& t) { return t.second == info.dtype; });
    expect(type != std::end(kTypes), "tensor \"{}\" has type {}, which safetensors files cannot hold", name,
           c10::toString(info.dtype));
    Table fields;
    fields.set("dtype", {std::string(type->first), {}});
    fields.set("shape", integers(info.shape));
    fields.set("data_offsets", integers(std::vector<uint64_t>{info.begin, info.end}));
    header.entries.push_back({name, {std::move(fields), {}}});
  }
  std::string json = to_json(header);
  const size_t size = std::max((kLengthBytes + json.size() + 7) / 8 * 8, minimum_size);
  json.resize(size - kLengthBytes, ' ');
  const uint64_t length = json.size();
  std::string bytes(kLengthBytes, '\0');
  std::memcpy(bytes.data(), &length, kLengthBytes);
  return bytes + json;
}

void write_safetensors(const std::string& path, const NamedTensors& tensors, const Metadata& metadata) {
  // Wide types first: with a header padded to 8 every tensor is aligned, as the format's own writer does it.
  std::vector<const std::pair<std::string, at::Tensor>*> order;
  std::set<std::string_view> names;
  for (const auto& named : tensors) {
    const auto& [name, tensor] = named;
    expect(name != "__metadata__" && names.insert(name).second, "{}: tensor name \"{}\" is given twice", path,
           name);
    expect(tensor.defined() && tensor.layout() == at::kStrided, "{}: tensor \"{}\" has no plain values", path,
           name);
    order.push_back(&named);
  }
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return a->second.element_size() > b->second.element_size();
  });
  std::vector<std::pair<std::string, TensorInfo>> infos;
  uint64_t position = 0;
  for (const auto* named : order) {
    const at::Tensor& tensor = named->second;
    const uint64_t end = position + static_cast<uint64_t>(tensor.numel()) * tensor.element_size();
    infos.emplace_back(named->first, TensorInfo{tensor.scalar_type(), tensor.sizes().vec(), position, end});
    position = end;
  }
  const std::string header = safetensors_header(infos, metadata);
  AtomicFile file(path);
  file.write(header);
  for (const auto* named : order) {
    const at::Tensor values = named->second.detach().cpu().resolve_conj().resolve_neg().contiguous();
    file.write(values.const_data_ptr(), values.nbytes());
  }
  file.commit();
}

}  // namespace oryx::formats
