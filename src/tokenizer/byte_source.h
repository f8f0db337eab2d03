// The bytes of a file as a stream, decompressed by its name: .gz, .xz, .zst, else as they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace oryx::tokenizer {

class ByteSource {
 public:
  virtual ~ByteSource() = default;

  // "-" is standard input, taken as it is. Throws Error when the file cannot be opened.
  static std::unique_ptr<ByteSource> open(const std::string& path);

  // Fills up to `size` > 0 bytes and returns how many; 0 only at the end. Throws Error naming the file when
  // it cannot be read or its compressed data is corrupt or cut off.
  virtual size_t read(char* out, size_t size) = 0;

  // Bytes read from the file so far, before decompression.
  virtual uint64_t file_bytes() const = 0;
};

}  // namespace oryx::tokenizer
