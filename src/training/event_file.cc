#include "training/event_file.h"

#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "base/error.h"

namespace oryx::training {

namespace {

constexpr std::array<uint32_t, 256> kCrcTable = [] {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0u);
    table[byte] = crc;
  }
  return table;
}();

uint32_t masked_crc(std::string_view bytes) { return std::rotr(crc32c(bytes), 15) + 0xa282ead8u; }

template <class Integer>
void append_little_endian(std::string& out, Integer value) {
  for (size_t byte = 0; byte < sizeof(Integer); ++byte) out.push_back(static_cast<char>(value >> (8 * byte)));
}

// The protobuf wire format: every field is preceded by its number and wire type.
enum WireType { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

void append_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
}

void append_tag(std::string& out, int field, WireType type) {
  append_varint(out, static_cast<uint64_t>(field) << 3 | type);
}

void append_bytes(std::string& out, int field, std::string_view bytes) {
  append_tag(out, field, kBytes);
  append_varint(out, bytes.size());
  out += bytes;
}

// Field numbers of event.proto and summary.proto.
constexpr int kEventWallTime = 1, kEventStep = 2, kEventFileVersion = 3, kEventSummary = 5,
              kEventSessionLog = 7;
constexpr int kSummaryValue = 1, kValueTag = 1, kValueSimple = 2;
constexpr int kSessionStatus = 1, kSessionStart = 1;

std::string host_name() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "localhost";
}

double wall_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  uint32_t crc = 0xFFFFFFFFu;
  for (const char c : bytes) crc = (crc >> 8) ^ kCrcTable[(crc ^ static_cast<unsigned char>(c)) & 0xFF];
  return ~crc;
}

EventFile::EventFile(const std::filesystem::path& directory, int64_t first_step)
    : path_(directory / fmt::format("events.out.tfevents.{}.{}.{}", static_cast<int64_t>(wall_time()),
                                    host_name(), getpid())),
      file_(std::fopen(path_.c_str(), "ab")) {
  expect(file_ != nullptr, "cannot write {}: {}", path_.string(), std::strerror(errno));
  std::string version;
  append_bytes(version, kEventFileVersion, "brain.Event:2");
  write_event(version, 0);
  std::string status, session;
  append_tag(status, kSessionStatus, kVarint);
  append_varint(status, kSessionStart);
  append_bytes(session, kEventSessionLog, status);
  write_event(session, first_step);
}

void EventFile::add_scalars(int64_t step, std::span<const std::pair<std::string, double>> scalars) {
  std::string summary;
  for (const auto& [name, scalar] : scalars) {
    std::string value;
    append_bytes(value, kValueTag, name);
    append_tag(value, kValueSimple, kFixed32);
    append_little_endian(value, std::bit_cast<uint32_t>(static_cast<float>(scalar)));
    append_bytes(summary, kSummaryValue, value);
  }
  std::string event;
  append_bytes(event, kEventSummary, summary);
  write_event(event, step);
}

void EventFile::write_event(std::string_view event_fields, int64_t step) {
  std::string event;
  append_tag(event, kEventWallTime, kFixed64);
  append_little_endian(event, std::bit_cast<uint64_t>(wall_time()));
  append_tag(event, kEventStep, kVarint);
  append_varint(event, static_cast<uint64_t>(step));
  event += event_fields;

  std::string record;
  append_little_endian(record, static_cast<uint64_t>(event.size()));
  append_little_endian(record, masked_crc(record));
  record += event;
  append_little_endian(record, masked_crc(event));
  const bool written = std::fwrite(record.data(), 1, record.size(), file_.get()) == record.size();
  expect(written && std::fflush(file_.get()) == 0, "cannot write {}: {}", path_.string(),
         std::strerror(errno));
}

}  // namespace oryx::training
