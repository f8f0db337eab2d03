// TensorBoard event files, written without TensorFlow or protobuf (LibTorch carries its own copy of the
// latter, and two copies in one process clash).
//
// A file is a sequence of TFRecords: length (uint64, little-endian), masked CRC-32C of the length, payload,
// masked CRC-32C of the payload; masked = rotate_right(crc, 15) + 0xa282ead8. Each payload is an `Event`
// message of tensorflow/core/util/event.proto.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace oryx::training {

// CRC-32C (Castagnoli), as RFC 3720 defines it.
uint32_t crc32c(std::string_view bytes);

class EventFile {
 public:
  // Creates events.out.tfevents.<seconds>.<host>.<process> in an existing directory. Readers forget what
  // earlier files of the directory say about `first_step` and later ones: they come from an interrupted run.
  EventFile(const std::filesystem::path& directory, int64_t first_step);

  // One scalar chart point per name. Throws Error when the disk is full.
  void add_scalars(int64_t step, std::span<const std::pair<std::string, double>> scalars);

 private:
  void write_event(std::string_view event_fields, int64_t step);

  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::filesystem::path path_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace oryx::training
